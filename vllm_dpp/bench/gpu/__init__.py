"""Everything that only a GPU can show, in stages; see ``command``."""
