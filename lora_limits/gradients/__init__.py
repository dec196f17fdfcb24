"""The verb: exact, polynomial and chained gradients, their cost, and the choice between them."""
