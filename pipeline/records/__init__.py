"""What lies in `runs/` and `evaluations/`: a frozen, numbered model of each record, and the one place that keeps it.

    trial       a trial's config.json, epochs, end and checkpoint; where a number comes from; what a slot says of it
    store       `runs/`: reads and writes the trials' folders, and locks them
    journal     `runs/journal.jsonl`: a line an event
    evaluation  `evaluations/`: scored trials, measurements, the cells of studies

No record imports torch, Ray or MLflow.
"""
