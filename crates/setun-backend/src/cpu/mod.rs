//! The CPU: instruction sets, threads and blocked products.

#[cfg(target_arch = "x86_64")]
pub(crate) mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx2_packed;
pub mod gemm;
pub mod int8;
pub(crate) mod isa;
pub mod operand;
pub mod packed;
pub mod peak;
pub mod pool;

pub use isa::Isa;
pub(crate) use isa::multiversion;
pub use pool::{Pool, RowParts, RowsMut};
