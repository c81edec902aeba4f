//! Instruction sets: which one this machine has, and kernels compiled for each.

/// Instruction set that kernels run on. All give the same bits.
///
/// Other crates cannot make one of those that a machine may lack, but by
/// [`Isa::available`], which looks: kernels rely on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Isa {
    /// Plain code in plain order: the definition.
    Reference,
    /// x86-64 with AVX2 and FMA.
    #[non_exhaustive]
    Avx2,
    /// [`Self::Avx2`], and AVX-512 with byte dots (F, BW, DQ, VL, VNNI).
    #[non_exhaustive]
    Avx512,
    /// [`Self::Avx512`], and dots of bf16.
    #[non_exhaustive]
    Avx512Bf16,
    /// [`Self::Avx512Bf16`], and matrix tiles of bf16 and int8.
    #[non_exhaustive]
    Amx,
    /// AArch64, whose baseline has NEON and FMA.
    #[non_exhaustive]
    Neon,
}

impl Isa {
    /// Every instruction set that this machine can run, slower ones first.
    pub fn available() -> Vec<Self> {
        let mut all = vec![Self::Reference];
        #[cfg(target_arch = "x86_64")]
        if std::is_x86_feature_detected!("avx2") && std::is_x86_feature_detected!("fma") {
            all.push(Self::Avx2);
            if has_avx512() {
                all.push(Self::Avx512);
                // Every processor with AMX has dots of bf16 too, which attention uses beside it.
                if std::is_x86_feature_detected!("avx512bf16") {
                    all.push(Self::Avx512Bf16);
                    if super::amx::available() {
                        all.push(Self::Amx);
                    }
                }
            }
        }
        #[cfg(target_arch = "aarch64")]
        all.push(Self::Neon);
        all
    }

    /// The fastest one.
    pub fn detect() -> Self {
        let mut all = Self::available();
        #[cfg(target_arch = "x86_64")]
        all.retain(|&isa| isa != Self::Amx || !super::amx::in_software());
        all.pop().unwrap_or(Self::Reference)
    }

    /// Whether kernels for AVX2 may run.
    #[inline(always)]
    pub fn has_avx2(self) -> bool {
        self == Self::Avx2 || self.has_avx512()
    }

    /// Whether kernels for AVX-512 may run.
    #[inline(always)]
    pub fn has_avx512(self) -> bool {
        matches!(self, Self::Avx512 | Self::Avx512Bf16 | Self::Amx)
    }

    /// Whether the processor multiplies bf16 itself.
    #[inline(always)]
    pub fn has_bf16(self) -> bool {
        matches!(self, Self::Avx512Bf16 | Self::Amx)
    }

    /// Name as it is written in `SETUN_ISA`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Reference => "reference",
            Self::Avx2 => "avx2",
            Self::Avx512 => "avx512",
            Self::Avx512Bf16 => "avx512bf16",
            Self::Amx => "amx",
            Self::Neon => "neon",
        }
    }

    /// The instruction set called `name`, if this machine has it.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::available().into_iter().find(|isa| isa.name() == name)
    }
}

#[cfg(target_arch = "x86_64")]
fn has_avx512() -> bool {
    std::is_x86_feature_detected!("avx512f")
        && std::is_x86_feature_detected!("avx512bw")
        && std::is_x86_feature_detected!("avx512dq")
        && std::is_x86_feature_detected!("avx512vl")
        && std::is_x86_feature_detected!("avx512vnni")
}

/// Compiles an `inline(always)` kernel once per instruction set behind one function with
/// an [`Isa`] in front. The generics are written in brackets.
macro_rules! multiversion {
    ($(#[$doc:meta])* fn $name:ident[$($gen:tt)*][$($use:tt)*]($($arg:ident: $ty:ty),* $(,)?)
        $(-> $ret:ty)? = $kernel:expr;) => {
        $(#[$doc])*
        #[allow(clippy::too_many_arguments)]
        pub(crate) fn $name<$($gen)*>(isa: $crate::cpu::Isa, $($arg: $ty),*) $(-> $ret)? {
            #[cfg(target_arch = "x86_64")]
            if isa.has_avx2() {
                #[target_feature(enable = "avx2,fma")]
                #[allow(clippy::too_many_arguments)]
                fn avx2<$($gen)*>($($arg: $ty),*) $(-> $ret)? {
                    $kernel($($arg),*)
                }
                // SAFETY: an `Isa` that has AVX2 is made by `Isa::available` only, after
                // CPUID has shown AVX2 and FMA.
                return unsafe { avx2::<$($use)*>($($arg),*) };
            }
            let _ = isa;
            $kernel($($arg),*)
        }
    };
}

pub(crate) use multiversion;
