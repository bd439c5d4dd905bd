"""The tuning log, written from the records alone: the same records, the same bytes.

    search.reading     Optuna and MLflow -> StudyRecord
    facts              StudyRecord -> Facts: every number of the log, computed once, in no language
        experiment       a trial: what changed, its epochs with their marks, what was learnt
        noise            by how much losses must differ
        parameters       what the trials say of each parameter, and how sure that is
        importance       which parameters decide
        summary          budget, health, decision tree, recommended configuration, lessons
        next_steps       what is open, as commands
    render             Facts -> Markdown, by a template for each language
    page               Markdown -> one HTML file
    plots              Facts -> PNG, the same for all languages

`search.report.write` names the functions that write files.
"""
