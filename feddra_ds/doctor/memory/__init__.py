"""How much memory a rank will need, before anything starts: `plan_memory`. See plan.py, and run.py for what is booked."""

from feddra_ds.doctor.memory.plan import MemoryPlan, plan_memory

__all__ = ["MemoryPlan", "plan_memory"]
