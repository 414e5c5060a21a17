"""Which recording goes with which answer: files of rows, published data sets, splits and subsets."""
