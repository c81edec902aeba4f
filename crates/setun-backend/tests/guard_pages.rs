//! Kernels with pointers in them neither read nor write beyond their slices: these end, or
//! begin, at a page that nobody may touch, at every length and alignment from 0 to 63. A
//! touch would end the process. Results are those of the portable kernels on plain memory.
#![cfg(all(target_os = "linux", target_pointer_width = "64"))]

mod rig;

use half::bf16;
use rig::{numbers, randoms, trits};
use setun_backend::attention::{AttentionShape, backward, forward};
use setun_backend::cpu::gemm::{Gemm, SCRATCH, gemm};
use setun_backend::cpu::int8::{Int8Rows, Int8Shape, TernaryRows, int8_linear, scratch_len};
use setun_backend::cpu::operand::{Operand, Values};
use setun_backend::cpu::{Isa, Pool};
use setun_backend::kernels::product::Order;
use std::ffi::{c_int, c_void};
use std::ops::{Deref, DerefMut};

const PAGE: usize = 4096;
const PROT_NONE: c_int = 0;
const PROT_READ_WRITE: c_int = 3;
const MAP_PRIVATE_ANONYMOUS: c_int = 0x22;

unsafe extern "C" {
    fn mmap(
        at: *mut c_void,
        len: usize,
        prot: c_int,
        flags: c_int,
        fd: c_int,
        off: i64,
    ) -> *mut c_void;
    fn mprotect(at: *mut c_void, len: usize, prot: c_int) -> c_int;
    fn munmap(at: *mut c_void, len: usize) -> c_int;
}

/// Where the untouchable page is.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Guard {
    /// Directly behind the last value.
    Behind,
    /// Directly before the first value.
    Before,
}

/// Values next to an untouchable page; the other side has one as well, further away.
struct Guarded<T> {
    map: *mut u8,
    map_len: usize,
    values: *mut T,
    len: usize,
}

impl<T: Copy> Guarded<T> {
    fn new(values: &[T], guard: Guard) -> Self {
        let bytes = size_of_val(values);
        let room = bytes.next_multiple_of(PAGE).max(PAGE);
        let map_len = room + 2 * PAGE;
        // SAFETY: a new private mapping at an address of the system's choice.
        let map = unsafe {
            mmap(
                std::ptr::null_mut(),
                map_len,
                PROT_READ_WRITE,
                MAP_PRIVATE_ANONYMOUS,
                -1,
                0,
            )
        };
        assert_ne!(map.addr(), usize::MAX, "mmap");
        let map = map.cast::<u8>();
        let start = match guard {
            Guard::Behind => PAGE + room - bytes,
            Guard::Before => PAGE,
        };
        // SAFETY: `start + bytes` lies between the first and the last page of the mapping,
        // and is aligned: page borders are, and `bytes` is a multiple of the size of T. The
        // two pages belong to the mapping.
        let at = unsafe {
            let at = map.add(start).cast::<T>();
            std::ptr::copy_nonoverlapping(values.as_ptr(), at, values.len());
            assert_eq!(mprotect(map.cast(), PAGE, PROT_NONE), 0);
            assert_eq!(mprotect(map.add(PAGE + room).cast(), PAGE, PROT_NONE), 0);
            at
        };
        Self {
            map,
            map_len,
            values: at,
            len: values.len(),
        }
    }
}

impl<T> Deref for Guarded<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        // SAFETY: `new` wrote that many values there; the mapping lives as long as `self`.
        unsafe { std::slice::from_raw_parts(self.values, self.len) }
    }
}

impl<T> DerefMut for Guarded<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        // SAFETY: as in `deref`; `&mut self` is the only way to the values.
        unsafe { std::slice::from_raw_parts_mut(self.values, self.len) }
    }
}

impl<T> Drop for Guarded<T> {
    fn drop(&mut self) {
        // SAFETY: the mapping of `new`, once.
        unsafe { munmap(self.map.cast(), self.map_len) };
    }
}

const GUARDS: [Guard; 2] = [Guard::Behind, Guard::Before];

/// Sizes of which one runs through 0 to 63 while the others stay.
fn sizes() -> impl Iterator<Item = [usize; 3]> {
    let others = [(1, 5), (7, 18), (33, 64)];
    let run = move |n: usize| {
        others
            .into_iter()
            .flat_map(move |(a, b)| [[n, a, b], [a, n, b], [a, b, n]])
    };
    (0..64).flat_map(run)
}

fn sum_bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|x| x.to_bits()).collect()
}

/// A product with one kind of values on both sides.
fn product(
    isa: Isa,
    shape: Gemm,
    a: Values<'_, f32>,
    b: Values<'_, f32>,
    c: &mut [f32],
    scratch: &mut [f32],
) {
    let operand = |values| Operand {
        values,
        width: shape.depth,
        depth_in_rows: false,
    };
    gemm(
        &Pool::new(1),
        isa,
        shape,
        operand(a),
        operand(b),
        c,
        scratch,
    );
}

#[test]
fn products_stay_inside() {
    let plain_scratch = vec![0.0f32; SCRATCH];
    let mut count = 0;
    for isa in Isa::available() {
        for (case, [rows, cols, depth]) in sizes().enumerate() {
            let guard = GUARDS[case % 2];
            let (a, b) = (
                randoms::<f32>(1, rows * depth),
                randoms::<f32>(2, cols * depth),
            );
            let half = |x: &[f32]| -> Vec<bf16> { x.iter().map(|&x| bf16::from_f32(x)).collect() };
            for order in [Order::Sequential, Order::EvenOdd] {
                let shape = Gemm {
                    rows,
                    cols,
                    depth,
                    order,
                };
                let mut scratch = Guarded::new(&plain_scratch, Guard::Behind);
                let mut c = Guarded::new(&vec![0.5f32; rows * cols], guard);
                let mut expected = vec![0.5f32; rows * cols];
                let mut work = plain_scratch.clone();
                let (ga, gb) = (Guarded::new(&a, guard), Guarded::new(&b, guard));
                if order == Order::Sequential {
                    product(
                        isa,
                        shape,
                        Values::Plain(&ga),
                        Values::Plain(&gb),
                        &mut c,
                        &mut scratch,
                    );
                    let plain = (Values::Plain(&a), Values::Plain(&b));
                    product(
                        Isa::Reference,
                        shape,
                        plain.0,
                        plain.1,
                        &mut expected,
                        &mut work,
                    );
                } else {
                    let (ha, hb) = (half(&a), half(&b));
                    let (ga, gb) = (Guarded::new(&ha, guard), Guarded::new(&hb, guard));
                    product(
                        isa,
                        shape,
                        Values::Bf16(&ga),
                        Values::Bf16(&gb),
                        &mut c,
                        &mut scratch,
                    );
                    let plain = (Values::Bf16(&ha), Values::Bf16(&hb));
                    product(
                        Isa::Reference,
                        shape,
                        plain.0,
                        plain.1,
                        &mut expected,
                        &mut work,
                    );
                }
                assert_eq!(sum_bits(&c), sum_bits(&expected), "{isa:?} {shape:?}");
                count += 1;
            }
        }
    }
    println!("{count} products");
}

#[test]
fn int8_products_stay_inside() {
    let mut count = 0;
    for isa in Isa::available() {
        for (case, [rows, out, width]) in sizes().enumerate().filter(|(_, sizes)| sizes[2] > 0) {
            let guard = GUARDS[case % 2];
            for group_size in [16, 64] {
                let groups = width.div_ceil(group_size);
                let q: Vec<i8> = numbers(3, rows * width, 255)
                    .into_iter()
                    .map(|x| (x as i32 - 127) as i8)
                    .collect();
                let (a, s) = (
                    randoms::<f32>(4, rows * groups),
                    randoms::<f32>(5, out * groups),
                );
                let t = trits(6, out * width);
                let shape = Int8Shape {
                    rows,
                    out,
                    width,
                    group_size,
                };
                let scratch = vec![0u8; scratch_len(width, group_size)];
                let run = |isa,
                           q: &[i8],
                           a: &[f32],
                           t: &[i8],
                           s: &[f32],
                           y: &mut [f32],
                           scratch: &mut [u8]| {
                    let x = Int8Rows { q, scales: a };
                    let w = TernaryRows {
                        trits: t,
                        scales: s,
                    };
                    int8_linear(&Pool::new(1), isa, shape, x, w, y, scratch);
                };
                let mut y = Guarded::new(&vec![0.0f32; rows * out], guard);
                let (gq, ga) = (Guarded::new(&q, guard), Guarded::new(&a, guard));
                let (gt, gs) = (Guarded::new(&t, guard), Guarded::new(&s, guard));
                let mut gscratch = Guarded::new(&scratch, Guard::Behind);
                run(isa, &gq, &ga, &gt, &gs, &mut y, &mut gscratch);
                let mut expected = vec![0.0f32; rows * out];
                run(
                    Isa::Reference,
                    &q,
                    &a,
                    &t,
                    &s,
                    &mut expected,
                    &mut scratch.clone(),
                );
                assert_eq!(
                    sum_bits(&y),
                    sum_bits(&expected),
                    "{isa:?} {rows} {out} {width}"
                );
                count += 1;
            }
        }
    }
    println!("{count} int8 products");
}

#[test]
fn attention_stays_inside() {
    for seq in 1..=64 {
        let head_dim = 2 * (1 + seq % 32);
        let shape = AttentionShape {
            batch: 1,
            num_heads: 2,
            num_kv_heads: 1,
            seq,
            head_dim,
            tile: 16,
        };
        let (queries, keys) = (2 * seq * head_dim, seq * head_dim);
        let guard = GUARDS[seq % 2];
        let random = |stream, len| Guarded::new(&randoms::<f32>(stream, len), guard);
        let zeros = |len| Guarded::new(&vec![0.0f32; len], guard);
        let (q, k, v) = (random(1, queries), random(2, keys), random(3, keys));
        let (mut out, mut lse, dout) = (zeros(queries), zeros(2 * seq), random(4, queries));
        forward(shape, &q, &k, &v, None, &mut out, &mut lse).unwrap();
        let (mut dq, mut dk, mut dv) = (zeros(queries), zeros(keys), zeros(keys));
        backward(
            shape, &q, &k, &v, None, &out, &lse, &dout, &mut dq, &mut dk, &mut dv,
        )
        .unwrap();
        let all = [&out, &lse, &dq, &dk, &dv];
        assert!(
            all.iter()
                .all(|values| values.iter().all(|x| x.is_finite()))
        );
    }
}

/// The page is really out of bounds: a child process that reads it dies.
#[test]
fn the_guard_guards() {
    const CHILD: &str = "SETUN_TEST_TOUCH";
    if std::env::var_os(CHILD).is_some() {
        let values = Guarded::new(&[1u8; 10], Guard::Behind);
        // SAFETY: none is claimed: the read is beyond the end, and ends this process.
        let beyond = unsafe { values.as_ptr().add(10).read_volatile() };
        println!("read {beyond}");
        return;
    }
    let mut child = std::process::Command::new(std::env::current_exe().unwrap());
    child.args(["the_guard_guards", "--exact"]).env(CHILD, "1");
    let output = child.output().unwrap();
    assert_eq!(output.status.code(), None, "{output:?}");
}
