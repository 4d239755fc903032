"""One file per kind of comparison; ``tokenry.compare.run.KINDS`` lists them."""
