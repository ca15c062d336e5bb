"""What lies in `runs/` and `evaluations/`: a frozen, numbered model of each record, and the one place that keeps it.

    epoch         an epoch's metrics and losses; what a slot says of a trial
    trial         config.json and done.json of a trial; where a number comes from
    trial_folder  `runs/<key>/`: reads and writes a trial's files
    state         state.json of a checkpoint
    event         a line of `runs/journal.jsonl`
    evaluation    a scored trial, a measurement, the cells of a study
    evaluations   `evaluations/`: reads and writes them

No record imports torch, Ray or MLflow.
"""
