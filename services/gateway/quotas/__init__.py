"""The quotas of tenants and the rates of classes."""
