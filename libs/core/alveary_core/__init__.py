"""What every service needs, once: event log, object store, gRPC scaffold, settings, telemetry, tokens."""
