//! The tile unit in software against what the manual says, by way of the instructions
//! themselves. On a processor that has the unit they run there, which tests what is expected
//! of it here.
#![cfg(all(target_arch = "x86_64", target_os = "linux"))]

use std::arch::asm;
use std::process::Command;

/// What LDTILECFG reads.
#[repr(C, align(64))]
struct Config([u8; 64]);

impl Config {
    /// Rows and bytes of each tile.
    fn new(tiles: &[(usize, usize)]) -> Self {
        let mut config = [0; 64];
        config[0] = 1;
        for (i, &(rows, bytes)) in tiles.iter().enumerate() {
            config[48 + i] = rows as u8;
            config[16 + 2 * i] = bytes as u8;
        }
        Self(config)
    }
}

/// Makes sure of a unit, and says whether it is the one in software.
fn is_in_software() -> bool {
    const ARCH_REQ_XCOMP_PERM: libc::c_long = 0x1023;
    const XFEATURE_XTILEDATA: libc::c_long = 18;
    setun_tiles::install() || {
        // SAFETY: asks what this process may do, and changes nothing else.
        let refused = unsafe {
            libc::syscall(
                libc::SYS_arch_prctl,
                ARCH_REQ_XCOMP_PERM,
                XFEATURE_XTILEDATA,
            )
        };
        assert_eq!(refused, 0, "neither AMX nor AVX2 to stand in for it");
        false
    }
}

/// Bytes that look random.
fn bytes(seed: usize, n: usize) -> Vec<u8> {
    let mix = |i: usize| ((i + seed) as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    (0..n).map(|i| (mix(i) >> 40) as u8).collect()
}

/// Rows, columns and groups of four bytes along the reduction of a dot.
type Sizes = (usize, usize, usize);

/// Sums, left and right, in rows of `STRIDE` bytes.
type Dot = fn(Sizes, &mut [u8], &[u8], &[u8]);

/// `dot` on tiles of `sizes`, from and to rows of `STRIDE` bytes.
macro_rules! dot {
    ($name:ident, $dot:literal) => {
        fn $name((m, n, k): Sizes, sums: &mut [u8], left: &[u8], right: &[u8]) {
            assert!(sums.len() >= m * STRIDE && left.len() >= m * STRIDE);
            assert!(right.len() >= k * STRIDE);
            let config = Config::new(&[(m, 4 * n), (m, 4 * k), (k, 4 * n)]);
            // SAFETY: the tiles' rows are in the slices; there is a unit, or what stands for it.
            unsafe {
                asm!(
                    "ldtilecfg [{config}]",
                    "tileloadd tmm0, [{sums} + 1*{stride}]",
                    "tileloadd tmm1, [{left} + 1*{stride}]",
                    "tileloadd tmm2, [{right} + 1*{stride}]",
                    $dot,
                    "tilestored [{sums} + 1*{stride}], tmm0",
                    "tilerelease",
                    config = in(reg) &config,
                    sums = in(reg) sums.as_mut_ptr(),
                    left = in(reg) left.as_ptr(),
                    right = in(reg) right.as_ptr(),
                    stride = in(reg) STRIDE,
                    out("tmm0") _, out("tmm1") _, out("tmm2") _,
                    options(nostack)
                );
            }
        }
    };
}

const STRIDE: usize = 80;

dot!(signed_signed, "tdpbssd tmm0, tmm1, tmm2");
dot!(signed_unsigned, "tdpbsud tmm0, tmm1, tmm2");
dot!(unsigned_signed, "tdpbusd tmm0, tmm1, tmm2");
dot!(unsigned_unsigned, "tdpbuud tmm0, tmm1, tmm2");
dot!(bf16, "tdpbf16ps tmm0, tmm1, tmm2");

const SIZES: [Sizes; 6] = [
    (1, 1, 1),
    (16, 16, 16),
    (3, 5, 7),
    (16, 1, 16),
    (2, 16, 3),
    (11, 13, 16),
];

fn value_at<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    bytes[at..][..N].try_into().unwrap()
}

#[test]
fn dots_of_bytes_are_their_sums_and_nothing_else_changes() {
    is_in_software();
    let kinds: [(Dot, [bool; 2]); 4] = [
        (signed_signed, [true, true]),
        (signed_unsigned, [true, false]),
        (unsigned_signed, [false, true]),
        (unsigned_unsigned, [false, false]),
    ];
    let wide = |byte: u8, signed: bool| match signed {
        true => i64::from(byte as i8),
        false => i64::from(byte),
    };
    for (seed, sizes) in SIZES.into_iter().enumerate() {
        let (m, n, k) = sizes;
        let [before, left, right] = [1, 2, 3].map(|i| bytes(1000 * seed + i, 16 * STRIDE));
        for (run, signed) in kinds {
            let mut sums = before.clone();
            run(sizes, &mut sums, &left, &right);
            let mut expected = before.clone();
            for (i, j) in (0..m).flat_map(|i| (0..n).map(move |j| (i, j))) {
                let at = i * STRIDE + 4 * j;
                let mut sum = i64::from(i32::from_le_bytes(value_at(&before, at)));
                for step in 0..4 * k {
                    let a = left[i * STRIDE + step];
                    let b = right[step / 4 * STRIDE + 4 * j + step % 4];
                    sum += wide(a, signed[0]) * wide(b, signed[1]);
                }
                expected[at..][..4].copy_from_slice(&(sum as i32).to_le_bytes());
            }
            assert_eq!(sums, expected, "{sizes:?}, {signed:?}");
        }
    }
}

fn flush(x: f32) -> f32 {
    if x.is_subnormal() {
        0.0f32.copysign(x)
    } else {
        x
    }
}

fn of_bf16(bytes: [u8; 2]) -> f32 {
    flush(f32::from_bits(u32::from(u16::from_le_bytes(bytes)) << 16))
}

#[test]
fn dots_of_bf16_are_an_even_and_an_odd_chain() {
    is_in_software();
    for (seed, sizes) in SIZES.into_iter().enumerate() {
        let (m, n, k) = sizes;
        let [mut before, mut left, mut right] =
            [4, 5, 6].map(|i| bytes(1000 * seed + i, 16 * STRIDE));
        // Exponents near that of one, so that rounding is what differs between orders.
        for pair in [&mut left, &mut right]
            .into_iter()
            .flat_map(|x| x.as_chunks_mut::<2>().0)
        {
            pair[1] = pair[1] & 0x80 | 0x3f;
        }
        for value in before.as_chunks_mut::<4>().0 {
            value[3] = value[3] & 0x80 | 0x3f;
        }
        let mut sums = before.clone();
        bf16(sizes, &mut sums, &left, &right);
        for (i, j) in (0..m).flat_map(|i| (0..n).map(move |j| (i, j))) {
            let mut chains = [0.0f32; 2];
            for step in 0..2 * k {
                let a = of_bf16(value_at(&left, i * STRIDE + 2 * step));
                let b = of_bf16(value_at(&right, step / 2 * STRIDE + 4 * j + step % 2 * 2));
                chains[step % 2] = flush(a.mul_add(b, chains[step % 2]));
            }
            let at = i * STRIDE + 4 * j;
            let sum = f32::from_le_bytes(value_at(&before, at));
            let expected = flush(flush(sum) + flush(chains[0] + chains[1]));
            let found = f32::from_le_bytes(value_at(&sums, at));
            assert_eq!(found.to_bits(), expected.to_bits(), "{sizes:?}, {i}, {j}");
        }
    }
}

/// One output of two steps of the even chain.
fn two_steps(sum: f32, pairs: [[f32; 2]; 2]) -> f32 {
    let high = |x: f32| (x.to_bits() >> 16) as u16;
    let (mut sums, mut left, mut right) = (vec![0; STRIDE], vec![0; STRIDE], vec![0; 2 * STRIDE]);
    sums[..4].copy_from_slice(&sum.to_le_bytes());
    for (i, [a, b]) in pairs.into_iter().enumerate() {
        left[4 * i..][..2].copy_from_slice(&high(a).to_le_bytes());
        right[i * STRIDE..][..2].copy_from_slice(&high(b).to_le_bytes());
    }
    bf16((1, 1, 2), &mut sums, &left, &right);
    f32::from_le_bytes(value_at(&sums, 0))
}

#[test]
fn denormals_are_zeros_and_tininess_is_tested_after_rounding() {
    is_in_software();
    let power = |exponent: i32| 2.0f32.powi(exponent);
    let none = [0.0, 0.0];
    // A denormal operand, a denormal sum, a denormal product.
    assert_eq!(two_steps(0.5, [[power(-130), power(100)], none]), 0.5);
    assert_eq!(two_steps(power(-140), [none, none]), 0.0);
    assert_eq!(two_steps(0.0, [[power(-70), power(-70)], none]), 0.0);
    // 2^-126 - 2^-150 has 24 bits: tiny. 2^-126 - 2^-152 is 2^-126 in 24 bits: not tiny.
    let less = |by: [f32; 2]| two_steps(0.0, [[power(-63), power(-63)], by]);
    assert_eq!(less([power(-75), -power(-75)]), 0.0);
    assert_eq!(less([power(-76), -power(-76)]), power(-126));
    // The thread's own arithmetic still has denormals.
    assert!(std::hint::black_box(power(-126)) * std::hint::black_box(0.5) > 0.0);
}

#[test]
fn each_thread_has_its_tiles() {
    is_in_software();
    let (left, right) = (bytes(7, 16 * STRIDE), bytes(8, 16 * STRIDE));
    let run = |sizes| {
        let mut sums = vec![0; 16 * STRIDE];
        signed_signed(sizes, &mut sums, &left, &right);
        sums
    };
    let alone = SIZES.map(run);
    std::thread::scope(|scope| {
        for (sizes, expected) in SIZES.into_iter().zip(&alone) {
            scope.spawn(move || (0..50).for_each(|_| assert_eq!(&run(sizes), expected)));
        }
    });
}

#[test]
fn rows_lie_where_base_index_and_displacement_say() {
    let is_counted = is_in_software();
    let from = bytes(9, 4096);
    let (mut to, mut saved) = (vec![0u8; 4096], Config([0; 64]));
    static CONFIG: Config = {
        let mut config = [0; 64];
        (config[0], config[16], config[48], config[18], config[49]) = (1, 12, 4, 64, 16);
        Config(config)
    };
    let before = setun_tiles::counts();
    // SAFETY: the rows that are named lie in the vectors; there is a unit, or what stands for it.
    unsafe {
        asm!(
            "ldtilecfg [rip + {config}]",
            "sttilecfg [{saved}]",
            "tilezero tmm1",
            // Four rows of 12 bytes at 16 * 8, from the last one to the first.
            "tileloadd tmm0, [r13 + 8*r12 + 1024]",
            "tilestored [r14 + 2*r15], tmm0",
            "tilestored [r14 + 2*r15 + 256], tmm1",
            "tileloaddt1 tmm0, [r13]",
            "tilestored [r14 + 4*r15 + 2048], tmm0",
            "tilerelease",
            config = sym CONFIG,
            saved = in(reg) &mut saved,
            in("r12") -16i64,
            in("r13") from.as_ptr(),
            in("r14") to.as_mut_ptr(),
            in("r15") 32usize,
            out("tmm0") _, out("tmm1") _,
            options(nostack)
        );
    }
    assert_eq!(saved.0, CONFIG.0);
    let mut expected = vec![0u8; 4096];
    for i in 0..4 {
        expected[64 * i..][..12].copy_from_slice(&from[1024 - 128 * i..][..12]);
        expected[2048 + 128 * i..][..12].copy_from_slice(&from[..12]);
    }
    assert!(to == expected, "rows in other places");
    if is_counted {
        // Other tests count, too.
        let after = setun_tiles::counts();
        assert!(after.loads >= before.loads + 2 && after.stores >= before.stores + 3);
    }
}

/// What this test program does when it is started again with the variable `CHILD`.
fn misbehave(how: &str) {
    is_in_software();
    // SAFETY: both end the process, which is what is tested.
    unsafe {
        match how {
            "another instruction" => asm!("ud2", options(nostack, nomem)),
            "no configuration" => asm!("tilezero tmm3", out("tmm3") _, options(nostack, nomem)),
            how => panic!("{how}?"),
        }
    }
}

const CHILD: &str = "SETUN_TILES_MISBEHAVE";

#[test]
fn what_is_not_for_the_unit_ends_the_process_as_ever() {
    use std::os::unix::process::ExitStatusExt;
    if let Ok(how) = std::env::var(CHILD) {
        return misbehave(&how);
    }
    let child = |how: &str| {
        Command::new(std::env::current_exe().unwrap())
            .args([
                "--exact",
                "what_is_not_for_the_unit_ends_the_process_as_ever",
            ])
            .arg("--nocapture")
            .env(CHILD, how)
            .output()
            .unwrap()
    };
    let other = child("another instruction");
    assert_eq!(other.status.signal(), Some(libc::SIGILL), "{other:?}");
    let unconfigured = child("no configuration");
    let said = String::from_utf8_lossy(&unconfigured.stderr);
    assert!(unconfigured.status.signal().is_some(), "{said}");
    let says_why = said.contains("a tile that is not configured");
    assert!(says_why || !is_in_software(), "{said}");
}
