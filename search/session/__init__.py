"""One search, from its first database to its last line: `Session`, the same for the command line and for programs.

session     the class: threads, messages, the order of the steps
opening     the study continued or created, and what it is run with
left        what there is to do: lost trials, waiting ones, repeats, the test loss
closing     what the search came to, in the log, in MLflow and as a `Result`
"""

from search.session.session import Session

__all__ = ["Session"]
