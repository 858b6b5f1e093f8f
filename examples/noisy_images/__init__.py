"""Train image classifiers on noisily labelled data with SGD, SAM, SANER and the rest of the family."""
