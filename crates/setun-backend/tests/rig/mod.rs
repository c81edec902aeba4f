//! A backend with buffers of given content: the ground on which operations are tested.
#![allow(dead_code)] // Each test binary uses its part.

use bytemuck::Pod;
use setun_backend::philox::Philox;
use setun_backend::{
    Backend, Buf, CacheBuf, CacheShape, Category, Host, HostWorkspace, Isa, Limits, Plan, Real,
};

/// A write that waits for the backend.
type Write<R> = Box<dyn FnOnce(&mut Host<R>)>;

/// Collects buffers; [`Rig::host`] then makes the backend that holds them.
pub struct Rig<R: Real> {
    plan: Plan,
    writes: Vec<Write<R>>,
}

impl<R: Real> Rig<R> {
    /// No buffers yet.
    pub fn new() -> Self {
        Self {
            plan: Plan::new(),
            writes: Vec::new(),
        }
    }

    /// A buffer that begins with `values`.
    pub fn put<T: Pod>(&mut self, values: &[T]) -> Buf<T> {
        let buf = self.room(values.len());
        let values = values.to_vec();
        let write = move |host: &mut Host<R>| host.write(buf, &values);
        self.writes.push(Box::new(write));
        buf
    }

    /// A buffer of zeros.
    pub fn room<T: Pod>(&mut self, len: usize) -> Buf<T> {
        self.plan.alloc(Category::Activations, "values", len)
    }

    /// A buffer of random values.
    pub fn random(&mut self, stream: u64, len: usize) -> Buf<R> {
        self.put(&randoms::<R>(stream, len))
    }

    /// A cache of keys and values, empty.
    pub fn cache(&mut self, shape: CacheShape) -> CacheBuf {
        shape.reserve(&mut self.plan, "cache")
    }

    /// The backend.
    pub fn host(mut self, isa: Isa, threads: usize, limits: Limits) -> Host<R> {
        let workspace = HostWorkspace::reserve(&mut self.plan, threads, limits);
        let mut host = Host::new(&self.plan, workspace, isa);
        for write in self.writes {
            write(&mut host);
        }
        host
    }
}

/// Standard normal values, the same on every machine.
pub fn randoms<R: Real>(stream: u64, len: usize) -> Vec<R> {
    let random = Philox::new(2026, stream);
    let values = (0..len as u64).map(|i| random.normal_pair(i).0);
    values.map(R::from_f64).collect()
}

/// Whole numbers below `end`.
pub fn numbers(stream: u64, len: usize, end: u32) -> Vec<u32> {
    let random = Philox::new(2026, stream);
    (0..len as u64).map(|i| random.block(i)[0] % end).collect()
}

/// Trits.
pub fn trits(stream: u64, len: usize) -> Vec<i8> {
    let digits = numbers(stream, len, 3);
    digits.into_iter().map(|d| d as i8 - 1).collect()
}

/// Scales as projections make them: bf16 values of about 0.05.
pub fn scales(stream: u64, len: usize) -> Vec<f32> {
    let values = randoms::<f32>(stream, len);
    let scale = |x: f32| (0.05 + 0.02 * x.abs()).round_bf16();
    values.into_iter().map(scale).collect()
}

/// The content of a buffer.
pub fn content<R: Real, T: Pod>(host: &Host<R>, buf: Buf<T>) -> Vec<T> {
    let mut values = vec![T::zeroed(); buf.len()];
    host.read(buf, &mut values);
    values
}

/// Bits of values, where equal is not enough.
pub fn bits(x: &[f32]) -> Vec<u32> {
    x.iter().map(|x| x.to_bits()).collect()
}

/// The bits of a buffer of f32.
pub fn content_bits(host: &Host<f32>, buf: Buf<f32>) -> Vec<u32> {
    bits(&content(host, buf))
}

/// Every instruction set, on one thread and on three.
pub fn machines() -> Vec<(Isa, usize)> {
    let isas = Isa::available().into_iter();
    isas.flat_map(|isa| [(isa, 1), (isa, 3)]).collect()
}
