"""The decision core of one compute target. Pure: no clock, no IO; times come in as arguments."""
