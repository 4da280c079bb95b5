"""The front end's process: start-up, and what becomes HTTP 400 before the engine hears of it."""
