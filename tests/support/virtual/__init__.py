"""The real step on a device that only writes down what it is told: `record`; checked by `hazards` and `order`, and played
under any speeds by `play`."""
