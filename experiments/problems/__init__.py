"""Inputs of the sweeps: families of random problems, embedded heads of a real model."""
