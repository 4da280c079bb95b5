"""Questions about many videos, answered by replicas of an engine under Ray Data.

`rows` reads what is asked, `replica` answers it, `pipeline` runs replicas under Ray Data, `answers`
keeps what was answered, and `command` is `vllm-dpp batch`.
"""
