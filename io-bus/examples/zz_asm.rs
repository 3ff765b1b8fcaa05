#![allow(missing_docs, clippy::unwrap_used)]
use io_bus::*;
use std::hint::black_box;
use std::time::Instant;
#[inline(never)]
#[unsafe(no_mangle)]
pub fn hot_read(io: &mut Dispatcher, a: u64, data: &mut [u8; 4]) -> bool {
    io.mmio_read(MmioAddress(a), data).is_answered()
}
struct E;
impl vm_device::DeviceMmio for E {
    fn mmio_read(&self, _: MmioAddress, _: u64, _: &mut [u8]) {}
    fn mmio_write(&self, _: MmioAddress, _: u64, _: &[u8]) {}
}
fn t(name: &str, mut f: impl FnMut(u64)) {
    let mut best = f64::MAX;
    for _ in 0..15 {
        let t = Instant::now();
        for i in 0..2_000_000u64 {
            f(i);
        }
        best = best.min(t.elapsed().as_nanos() as f64 / 2e6);
    }
    println!("{name} {best:.2}");
}
fn main() {
    let bus = IoBus::new();
    bus.register_mmio(
        MmioRange::new(MmioAddress(0x1000), 0x1000).unwrap(),
        std::sync::Arc::new(E),
    )
    .unwrap()
    .keep();
    let mut io = bus.dispatcher();
    let mut d = [0; 4];
    t("alu x8", |i| {
        let mut x = black_box(i);
        for _ in 0..8 {
            x = x.wrapping_mul(0x9e3779b97f4a7c15);
        }
        black_box(x);
    });
    t("hot", |i| {
        black_box(hot_read(&mut io, black_box(0x1000 + (i & 0xff)), &mut d));
    });
    t("hot same", |_| {
        black_box(hot_read(&mut io, black_box(0x1000), &mut d));
    });
    let dd: std::sync::Arc<dyn IoDevice> = std::sync::Arc::new(Mmio(std::sync::Arc::new(E)));
    let dd = black_box(dd);
    t("dyn", |_| {
        black_box(dd.read(
            At {
                base: black_box(1),
                offset: black_box(2),
            },
            &mut d,
        ));
    });
    t("dyn+ones", |_| {
        d = [0xff; 4];
        black_box(dd.read(
            At {
                base: black_box(1),
                offset: black_box(2),
            },
            &mut d,
        ));
    });
    let p = srcu::Published::new(5u64);
    let mut r = p.reader();
    t("srcu", |_| {
        black_box(*r.enter());
    });
    let m = std::sync::Mutex::new(5u64);
    t("mutex", |_| {
        black_box(*m.lock().unwrap());
    });
}
