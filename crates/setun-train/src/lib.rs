//! setun-train
