//! Instruction sets: which one this machine has, and kernels compiled for each.

/// Instruction set that kernels run on. All give the same bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Isa {
    /// Plain code in plain order: the definition.
    Reference,
    /// x86-64 with AVX2 and FMA.
    Avx2,
    /// AArch64, whose baseline has NEON and FMA.
    Neon,
}

impl Isa {
    /// Every instruction set that this machine can run.
    pub fn available() -> Vec<Self> {
        let mut all = vec![Self::Reference];
        #[cfg(target_arch = "x86_64")]
        if std::is_x86_feature_detected!("avx2") && std::is_x86_feature_detected!("fma") {
            all.push(Self::Avx2);
        }
        #[cfg(target_arch = "aarch64")]
        all.push(Self::Neon);
        all
    }

    /// The fastest one.
    pub fn detect() -> Self {
        Self::available().pop().unwrap_or(Self::Reference)
    }

    /// Name as it is written in `SETUN_ISA`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Reference => "reference",
            Self::Avx2 => "avx2",
            Self::Neon => "neon",
        }
    }

    /// The instruction set called `name`, if this machine has it.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::available().into_iter().find(|isa| isa.name() == name)
    }
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
            if isa == $crate::cpu::Isa::Avx2 {
                #[target_feature(enable = "avx2,fma")]
                #[allow(clippy::too_many_arguments)]
                fn avx2<$($gen)*>($($arg: $ty),*) $(-> $ret)? {
                    $kernel($($arg),*)
                }
                // SAFETY: `Isa::Avx2` is made by `Isa::available` only, after CPUID has
                // shown AVX2 and FMA.
                return unsafe { avx2::<$($use)*>($($arg),*) };
            }
            let _ = isa;
            $kernel($($arg),*)
        }
    };
}

pub(crate) use multiversion;
