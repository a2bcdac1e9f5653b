"""The round: clients, steps, the server's average, the coordinator's decisions. Reads no config file, prints nothing."""
