"""`gsae inspect`: what the rows of a store are like."""
