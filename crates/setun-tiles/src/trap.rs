//! SIGILL: the way from an instruction to the unit.

use crate::Counts;
use crate::decode::{Instruction, Numbers, decode};
use crate::unit::Unit;
use std::cell::RefCell;
use std::mem::MaybeUninit;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

thread_local! {
    /// Needs no memory and no destructor, so that a signal handler may use it.
    static UNIT: RefCell<Unit> = const { RefCell::new(Unit::NEW) };
}

static CONFIGURATIONS: AtomicU64 = AtomicU64::new(0);
static DOTS_INT8: AtomicU64 = AtomicU64::new(0);
static DOTS_BF16: AtomicU64 = AtomicU64::new(0);
static LOADS: AtomicU64 = AtomicU64::new(0);
static STORES: AtomicU64 = AtomicU64::new(0);

/// What SIGILL did before.
static BEFORE: OnceLock<libc::sigaction> = OnceLock::new();

pub(crate) fn install() -> bool {
    let can = std::is_x86_feature_detected!("avx2") && std::is_x86_feature_detected!("fma");
    let can = can && !processor_has_tiles();
    if can {
        BEFORE.get_or_init(|| {
            let mut before = MaybeUninit::uninit();
            // SAFETY: all zeros are a `sigaction`; the handler has the signature that its flag
            // promises, and the call fills in `before`, as SIGILL can be caught.
            unsafe {
                let mut action: libc::sigaction = std::mem::zeroed();
                action.sa_sigaction = on_undefined as *const () as usize;
                action.sa_flags = libc::SA_SIGINFO;
                let failed = libc::sigaction(libc::SIGILL, &action, before.as_mut_ptr());
                assert_eq!(failed, 0, "SIGILL can be caught");
                before.assume_init()
            }
        });
    }
    can
}

/// CPUID, leaf 7: AMX-TILE.
fn processor_has_tiles() -> bool {
    use std::arch::x86_64::{__cpuid_count, __get_cpuid_max};
    let (leaves, _) = __get_cpuid_max(0);
    leaves >= 7 && __cpuid_count(7, 0).edx >> 24 & 1 == 1
}

pub(crate) fn counts() -> Counts {
    Counts {
        configurations: CONFIGURATIONS.load(Relaxed),
        dots_int8: DOTS_INT8.load(Relaxed),
        dots_bf16: DOTS_BF16.load(Relaxed),
        loads: LOADS.load(Relaxed),
        stores: STORES.load(Relaxed),
    }
}

/// General registers in the order of their numbers.
const REGISTERS: [libc::c_int; 16] = [
    libc::REG_RAX,
    libc::REG_RCX,
    libc::REG_RDX,
    libc::REG_RBX,
    libc::REG_RSP,
    libc::REG_RBP,
    libc::REG_RSI,
    libc::REG_RDI,
    libc::REG_R8,
    libc::REG_R9,
    libc::REG_R10,
    libc::REG_R11,
    libc::REG_R12,
    libc::REG_R13,
    libc::REG_R14,
    libc::REG_R15,
];

/// Does the instructions of the tile unit that begin where the signal was raised, as many as follow
/// each other: a signal costs far more than one of them.
extern "C" fn on_undefined(
    signal: libc::c_int,
    _: *mut libc::siginfo_t,
    context: *mut libc::c_void,
) {
    // SAFETY: the third argument of such a handler.
    let context = unsafe { &mut *context.cast::<libc::ucontext_t>() };
    let general = &mut context.uc_mcontext.gregs;
    let registers = REGISTERS.map(|register| general[register as usize] as u64);
    let mut is_ours = false;
    loop {
        let at = general[libc::REG_RIP as usize] as u64;
        // SAFETY: the bytes of an instruction that the processor has met, or that follows one it
        // will go on with; no more of them are read than belong to it.
        let bytes = (0..).map(|i| unsafe { *((at + i) as *const u8) });
        let Some((instruction, len)) = decode(bytes, &registers, at) else {
            break;
        };
        count(instruction);
        // SAFETY: the program meant to execute this instruction, with these addresses;
        // `install` has looked for AVX2 and FMA.
        let result = UNIT.with_borrow_mut(|unit| unsafe { unit.run(instruction) });
        if let Err(why) = result {
            // The handler cannot unwind, so this ends the process.
            panic!("the processor would not do {instruction:?}: {why}");
        }
        general[libc::REG_RIP as usize] = (at + len) as i64;
        is_ours = true;
    }
    if !is_ours {
        // Somebody else's: as it was before, and once more.
        let before = BEFORE.get().map_or(std::ptr::null(), std::ptr::from_ref);
        // SAFETY: a disposition that the system gave.
        unsafe { libc::sigaction(signal, before, std::ptr::null_mut()) };
    }
}

fn count(instruction: Instruction) {
    let counter = match instruction {
        Instruction::Configure(_) => &CONFIGURATIONS,
        Instruction::Dot {
            numbers: Numbers::Bf16,
            ..
        } => &DOTS_BF16,
        Instruction::Dot { .. } => &DOTS_INT8,
        Instruction::Load(..) => &LOADS,
        Instruction::Store(..) => &STORES,
        _ => return,
    };
    counter.fetch_add(1, Relaxed);
}
