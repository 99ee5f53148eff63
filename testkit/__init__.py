"""What tests, benches and the VM share: namespaces, services, clients, fakes.

Nothing here is a test, and nothing in `steer` imports it."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
"""The checkout."""
