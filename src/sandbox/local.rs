//! The local backend: Linux namespaces, no daemon, root or not. Strong process isolation, not a virtual machine.
