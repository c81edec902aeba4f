//! Machine code to instructions of the tile unit (Intel SDM, volume 2, chapter 2 for the
//! encoding and the entries of LDTILECFG to TILEZERO for the opcodes).

/// An instruction with its addresses computed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Instruction {
    /// LDTILECFG from an address.
    Configure(u64),
    /// STTILECFG to an address.
    SaveConfiguration(u64),
    /// TILERELEASE.
    Release,
    /// TILEZERO.
    Zero(usize),
    /// TILELOADD and TILELOADDT1.
    Load(usize, Rows),
    /// TILESTORED.
    Store(usize, Rows),
    /// TDPBSSD and its kin, TDPBF16PS: `tiles` are sums, left, right.
    Dot { numbers: Numbers, tiles: [usize; 3] },
}

/// Rows in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Rows {
    pub(crate) start: u64,
    /// Bytes from a row to the next; negative ones wrap.
    pub(crate) stride: u64,
}

/// What a dot multiplies: bytes of the left and the right tile with or without a sign, or bf16.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Numbers {
    Bytes { signed: [bool; 2] },
    Bf16,
}

/// Code from where an instruction begins.
struct Code<I> {
    bytes: I,
    taken: u64,
}

impl<I: Iterator<Item = u8>> Code<I> {
    fn byte(&mut self) -> Option<u8> {
        self.taken += 1;
        self.bytes.next()
    }

    fn displacement(&mut self, bytes: usize) -> Option<u64> {
        let mut value = [0; 4];
        for byte in &mut value[..bytes] {
            *byte = self.byte()?;
        }
        Some(match bytes {
            0 => 0,
            1 => i64::from(value[0] as i8) as u64,
            _ => i64::from(i32::from_le_bytes(value)) as u64,
        })
    }
}

/// The fields of a VEX prefix and of the byte behind the opcode.
struct Fields {
    /// Highest bits of register numbers: of the field `reg`, of index and of base.
    high: [usize; 3],
    /// Register in the prefix.
    third: usize,
    /// What stands for an older prefix: none, 66, F3, F2.
    prefix: u8,
    opcode: u8,
    mode: u8,
    reg: usize,
    rm: usize,
}

impl Fields {
    fn read(code: &mut Code<impl Iterator<Item = u8>>) -> Option<Self> {
        if code.byte()? != 0xc4 {
            return None;
        }
        let (first, second, opcode, operands) =
            (code.byte()?, code.byte()?, code.byte()?, code.byte()?);
        // Opcodes of 0F 38, W and L zero.
        if first & 0x1f != 2 || second & 0x84 != 0 {
            return None;
        }
        let high = |bit: u8| usize::from(!first >> bit & 1) << 3;
        Some(Self {
            high: [high(7), high(6), high(5)],
            third: usize::from(!second >> 3 & 0xf),
            prefix: second & 3,
            opcode,
            mode: operands >> 6,
            reg: usize::from(operands >> 3 & 7),
            rm: usize::from(operands & 7),
        })
    }

    /// Base and scaled index of the operand in memory. `at` is the address of the instruction.
    fn address(
        &self,
        code: &mut Code<impl Iterator<Item = u8>>,
        registers: &[u64; 16],
        at: u64,
    ) -> Option<Rows> {
        let (mut base, mut stride) = (Some(self.rm), 0);
        if self.rm == 4 {
            let sib = code.byte()?;
            let index = usize::from(sib >> 3 & 7) + self.high[1];
            if index != 4 {
                stride = registers[index] << (sib >> 6);
            }
            base = Some(usize::from(sib & 7));
        }
        let mut bytes = [0, 1, 4][usize::from(self.mode)];
        let mut of_code = false;
        if self.mode == 0 && base == Some(5) {
            // No base; relative to the code if there is no index byte either.
            (base, bytes, of_code) = (None, 4, self.rm == 5);
        }
        let displacement = code.displacement(bytes)?;
        let base = match base {
            Some(base) => registers[base + self.high[2]],
            None if of_code => at.wrapping_add(code.taken),
            None => 0,
        };
        let start = base.wrapping_add(displacement);
        Some(Rows { start, stride })
    }
}

/// The instruction whose code begins with `bytes`, at the address `at`, and its length; none if it
/// is not one of the tile unit's. `registers` are in the order of their numbers. Takes
/// no more bytes than it must.
pub(crate) fn decode(
    bytes: impl Iterator<Item = u8>,
    registers: &[u64; 16],
    at: u64,
) -> Option<(Instruction, u64)> {
    let mut code = Code { bytes, taken: 0 };
    let fields = Fields::read(&mut code)?;
    let instruction = match fields.mode {
        3 => of_registers(&fields)?,
        _ => {
            let rows = fields.address(&mut code, registers, at)?;
            of_memory(&fields, rows)?
        }
    };
    Some((instruction, code.taken))
}

fn of_registers(fields: &Fields) -> Option<Instruction> {
    let no_third = fields.third == 0;
    let numbers = match (fields.opcode, fields.prefix) {
        (0x49, 0) if (fields.reg, fields.rm) == (0, 0) && no_third => {
            return Some(Instruction::Release);
        }
        (0x49, 3) if fields.rm == 0 && no_third => return Some(Instruction::Zero(fields.reg)),
        (0x5c, 2) => Numbers::Bf16,
        (0x5e, prefix) => Numbers::Bytes {
            signed: [prefix >= 2, prefix & 1 == 1],
        },
        _ => return None,
    };
    let tiles = [fields.reg, fields.rm, fields.third];
    let are_tiles = fields.high == [0; 3] && fields.third < 8;
    are_tiles.then_some(Instruction::Dot { numbers, tiles })
}

fn of_memory(fields: &Fields, rows: Rows) -> Option<Instruction> {
    if fields.third != 0 {
        return None;
    }
    let has_index_byte = fields.rm == 4;
    Some(match (fields.opcode, fields.prefix) {
        (0x49, 0) if fields.reg == 0 => Instruction::Configure(rows.start),
        (0x49, 1) if fields.reg == 0 => Instruction::SaveConfiguration(rows.start),
        (0x4b, 1 | 3) if has_index_byte => Instruction::Load(fields.reg, rows),
        (0x4b, 2) if has_index_byte => Instruction::Store(fields.reg, rows),
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Register `i` holds `1000 * i`; the code lies at 70,000.
    fn decoded(bytes: &[u8]) -> Option<(Instruction, u64)> {
        let registers = std::array::from_fn(|i| 1000 * i as u64);
        // An end of the code is an end of the bytes: nothing behind them is looked at.
        let mut left = bytes.iter().copied();
        let end = std::iter::from_fn(|| Some(left.next().expect("a byte too many is read")));
        decode(end, &registers, 70_000)
    }

    #[test]
    fn addresses_are_what_an_assembler_meant() {
        let load = |tile, start, stride| Some(Instruction::Load(tile, Rows { start, stride }));
        // As GNU as 2.40 encodes them.
        let cases: [(&[u8], Option<Instruction>); 9] = [
            // tileloadd tmm1, [rax + rbx]
            (&[0xc4, 0xe2, 0x7b, 0x4b, 0x0c, 0x18], load(1, 0, 3000)),
            // tileloadd tmm7, [r9 + 4*r10 - 8]
            (
                &[0xc4, 0x82, 0x7b, 0x4b, 0x7c, 0x91, 0xf8],
                load(7, 8992, 40_000),
            ),
            // tileloaddt1 tmm0, [rbp + r12]
            (
                &[0xc4, 0xa2, 0x79, 0x4b, 0x44, 0x25, 0],
                load(0, 5000, 12_000),
            ),
            // tileloadd tmm2, [r13 + 512]
            (
                &[0xc4, 0xc2, 0x7b, 0x4b, 0x94, 0x25, 0, 2, 0, 0],
                load(2, 13_512, 0),
            ),
            // tileloadd tmm3, [2*rcx + 64]
            (
                &[0xc4, 0xe2, 0x7b, 0x4b, 0x1c, 0x4d, 64, 0, 0, 0],
                load(3, 64, 2000),
            ),
            // tilestored [rsp + rdx], tmm5
            (
                &[0xc4, 0xe2, 0x7a, 0x4b, 0x2c, 0x14],
                Some(Instruction::Store(
                    5,
                    Rows {
                        start: 4000,
                        stride: 2000,
                    },
                )),
            ),
            // ldtilecfg [rip + 16], which is behind nine bytes
            (
                &[0xc4, 0xe2, 0x78, 0x49, 0x05, 16, 0, 0, 0],
                Some(Instruction::Configure(70_025)),
            ),
            // ldtilecfg [r12]
            (
                &[0xc4, 0xc2, 0x78, 0x49, 0x04, 0x24],
                Some(Instruction::Configure(12_000)),
            ),
            // sttilecfg [r15]
            (
                &[0xc4, 0xc2, 0x79, 0x49, 0x07],
                Some(Instruction::SaveConfiguration(15_000)),
            ),
        ];
        for (bytes, expected) in cases {
            let expected = expected.map(|instruction| (instruction, bytes.len() as u64));
            assert_eq!(decoded(bytes), expected, "{bytes:x?}");
        }
    }

    #[test]
    fn registers_and_kinds_of_dots() {
        let bytes = |signed| Numbers::Bytes { signed };
        // tdpb..d tmm2, tmm4, tmm6 and tdpbf16ps tmm2, tmm4, tmm6
        let cases = [
            ([0x4b, 0x5e], bytes([true, true])),
            ([0x4a, 0x5e], bytes([true, false])),
            ([0x49, 0x5e], bytes([false, true])),
            ([0x48, 0x5e], bytes([false, false])),
            ([0x4a, 0x5c], Numbers::Bf16),
        ];
        for ([prefix, opcode], numbers) in cases {
            let dot = Instruction::Dot {
                numbers,
                tiles: [2, 4, 6],
            };
            let code = [0xc4, 0xe2, prefix, opcode, 0xd4];
            assert_eq!(decoded(&code), Some((dot, 5)));
        }
        let others = [
            ([0x78, 0x49, 0xc0], Some(Instruction::Release)),
            ([0x7b, 0x49, 0xe8], Some(Instruction::Zero(5))),
            // Another register in the prefix; another length; an instruction of another unit.
            ([0x70, 0x49, 0xc0], None),
            ([0x7f, 0x49, 0xe8], None),
            ([0x79, 0x58, 0xc1], None),
        ];
        for ([prefix, opcode, operands], expected) in others {
            let code = [0xc4, 0xe2, prefix, opcode, operands];
            assert_eq!(
                decoded(&code).map(|decoded| decoded.0),
                expected,
                "{code:x?}"
            );
        }
        assert_eq!(decoded(&[0x0f]), None);
    }
}
