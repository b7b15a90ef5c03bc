"""The paper's table: its six rows trained and evaluated by the public commands, from a checkout."""
