//! Operations allocate nothing: all memory is laid out before the first of them.
//!
//! The counter sees every thread, so this binary holds one test.

mod counting_allocator;
mod every_op;
mod rig;

use counting_allocator::allocations;
use every_op::{EveryOp, LIMITS};
use rig::Rig;
use setun_backend::Isa;

#[test]
fn a_second_run_of_every_operation_allocates_nothing() {
    for isa in Isa::available() {
        for threads in [1, 3] {
            let mut rig = Rig::new();
            let ops = EveryOp::new(&mut rig);
            let mut host = rig.host(isa, threads, LIMITS);
            let mut num_ops = 0;
            // The first run may set up what the system makes on first use, locks and such.
            ops.run(&mut host, &mut |_, _, _, _| num_ops += 1);
            assert!(num_ops > 40);
            let count = allocations(|| ops.run(&mut host, &mut |_, _, _, _| {}));
            assert_eq!(count, 0, "{isa:?}, {threads} threads");
        }
    }
    assert_eq!(allocations(|| drop(std::hint::black_box(vec![1u8]))), 1);
}
