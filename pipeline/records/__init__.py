"""What lies in `runs/` and `evaluations/`: a frozen, numbered model of each record, and the one place that keeps it.

    epoch         an epoch's metrics and losses; what a slot says of a trial
    trial         config.json and done.json of a trial, state.json of a checkpoint; where a number comes from
    trial_folder  `runs/<key>/`: reads and writes a trial's files
    store         `runs/`: the trials, and their lock
    journal       `runs/journal.jsonl`: a line an event
    evaluation    a scored trial, a measurement, the cells of a study
    evaluations   `evaluations/`: reads and writes them

No record imports torch, Ray or MLflow.
"""
