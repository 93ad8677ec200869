//! What can only be tried from inside: other CPUs' clocks. These need root.
