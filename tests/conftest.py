import os


# Tiny models: threads cost more than they bring. Set before torch is imported, so child processes inherit it
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"  # nothing here may reach for the network
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
