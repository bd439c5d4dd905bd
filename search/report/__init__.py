"""The tuning log, written from the records alone: the same records, the same bytes.

search.reading     Optuna and MLflow -> StudyRecord
facts              StudyRecord -> Facts: every number of the log, computed once, in no language
    experiment       one trial: what changed, its epochs, what was learnt
    epochs           an epoch's mark, and the metrics shown of it
    measured_noise   by how much losses must differ
    parameters       what the trials say about each parameter, and how certain that is
    level            which of its values did as well as the best
    importance       which parameters matter
    summary          budget, health, decision tree, recommended configuration, lessons
    next_steps       what is open, as commands
render             Facts -> Markdown, by a template for each language; words: its short texts
page               Markdown -> one HTML file
plots              Facts -> PNG, the same for all languages
write              the files
keeper             writes them while a study runs
"""
