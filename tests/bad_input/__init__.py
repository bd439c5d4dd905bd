"""Bad input of every kind: never a traceback, never a started trial, always the rule, the value and the way out."""
