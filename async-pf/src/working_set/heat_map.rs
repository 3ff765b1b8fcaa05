// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! [`HeatMap`]: a record as a picture of guest memory, first touches hot.

use std::fmt::{self, Write};
use std::time::Duration;

use memslots::PAGE_SIZE;

use super::WorkingSet;

/// The most columns and rows.
const MOST_SIDE: usize = 512;

/// Guest memory as a grid, lowest address first, row by row; each cell has how many of its pages were touched, and when
/// the first of them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HeatMap {
    columns: usize,
    /// Pages of a cell.
    cell_pages: u64,
    first: u64,
    pages: u64,
    touched: u64,
    end: Duration,
    cells: Vec<Cell>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Cell {
    touched: u64,
    /// The place of its first touch in the order of all pages, from 0.
    place: u64,
    after: Duration,
}

impl HeatMap {
    /// Of a record, in so many columns and rows at most; both are 1 to 512.
    pub fn new(record: &WorkingSet, columns: usize, rows: usize) -> Self {
        let (columns, rows) = (columns.clamp(1, MOST_SIDE), rows.clamp(1, MOST_SIDE));
        let cell_pages = record.pages().div_ceil((columns * rows) as u64).max(1);
        let count = record.pages().div_ceil(cell_pages) as usize;
        let mut cells = vec![Cell::default(); count];
        let mut place = 0;
        for run in record.runs() {
            for gfn in run.first.0..run.end() {
                let at = (gfn - record.first().0) / cell_pages;
                if let Some(cell) = cells.get_mut(at as usize) {
                    if cell.touched == 0 {
                        (cell.place, cell.after) = (place, run.after);
                    }
                    cell.touched += 1;
                }
                place += 1;
            }
        }
        Self {
            columns,
            cell_pages,
            first: record.first().0,
            pages: record.pages(),
            touched: place,
            end: record.runs().last().map_or(Duration::ZERO, |run| run.after),
            cells,
        }
    }

    /// As text: a row a line with its first address, a character a cell. `0` is in the first tenth of all first touches,
    /// `9` in the last, `.` was not touched.
    pub fn to_text(&self) -> String {
        let mut text = format!("{}\n", self.title());
        for (row, cells) in self.cells.chunks(self.columns).enumerate() {
            let line: String = cells.iter().map(|cell| self.digit(cell)).collect();
            writeln!(text, "{:#014x} {line}", self.address(row)).ok();
        }
        text
    }

    /// What the lines and characters of [`to_text`](Self::to_text) mean, in lines.
    pub fn legend(&self) -> String {
        let cell = kib(self.cell_pages);
        let line = kib(self.cell_pages.saturating_mul(self.columns as u64));
        format!(
            "a character is {cell} of guest memory, a line {line} from the address before it on\n\
             0 to 9  touched: the first of its pages was in the first tenth (0) to the last tenth (9) of all that were\n\
             .       not touched, or no memory\n"
        )
    }

    fn digit(&self, cell: &Cell) -> char {
        match cell.touched {
            0 => '.',
            _ => {
                let tenth = cell.place * 10 / self.touched.max(1);
                char::from(b'0' + tenth.min(9) as u8)
            }
        }
    }

    /// As a picture: one SVG, with nothing beside it. Red was touched first, blue last, grey never; pale cells had few of
    /// their pages touched. A cell tells its numbers to the pointer.
    pub fn to_svg(&self) -> String {
        self.svg().unwrap_or_default()
    }

    fn svg(&self) -> Result<String, fmt::Error> {
        const SIDE: usize = 8;
        const LEFT: usize = 112;
        const TOP: usize = 28;
        let rows = self.cells.len().div_ceil(self.columns);
        let width = LEFT + self.columns.max(40) * SIDE + 8;
        let height = TOP + rows * SIDE + 8;
        let mut svg = String::new();
        writeln!(
            svg,
            "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{width}\" height=\"{height}\" \
             viewBox=\"0 0 {width} {height}\" font-family=\"monospace\" font-size=\"9\">"
        )?;
        writeln!(svg, "<rect width=\"100%\" height=\"100%\" fill=\"#fff\"/>")?;
        writeln!(
            svg,
            "<text x=\"8\" y=\"16\" font-size=\"11\">{}</text>",
            self.title()
        )?;
        for (row, cells) in self.cells.chunks(self.columns).enumerate() {
            let y = TOP + row * SIDE;
            writeln!(
                svg,
                "<text x=\"8\" y=\"{}\">{:#014x}</text>",
                y + SIDE - 1,
                self.address(row)
            )?;
            let size = cells.len() * SIDE;
            writeln!(
                svg,
                "<rect x=\"{LEFT}\" y=\"{y}\" width=\"{size}\" height=\"{SIDE}\" fill=\"#e8e8e8\"/>"
            )?;
            for (column, cell) in cells
                .iter()
                .enumerate()
                .filter(|(_, cell)| cell.touched > 0)
            {
                // 0 is red, 240 is blue.
                let hue = cell.place * 240 / self.touched.max(1);
                let share = cell.touched * 100 / self.cell_pages;
                writeln!(
                    svg,
                    "<rect x=\"{}\" y=\"{y}\" width=\"{SIDE}\" height=\"{SIDE}\" \
                     fill=\"hsl({hue},90%,50%)\" fill-opacity=\"0.{:02}\"><title>{:#x}: {} of {} pages, \
                     first after {} ms</title></rect>",
                    LEFT + column * SIDE,
                    (35 + share * 64 / 100).min(99),
                    self.address(row) + column as u64 * self.cell_pages * PAGE_SIZE,
                    cell.touched,
                    self.cell_pages,
                    cell.after.as_millis(),
                )?;
            }
        }
        svg.push_str("</svg>\n");
        Ok(svg)
    }

    fn title(&self) -> String {
        format!(
            "{} of {} pages touched in {} ms; a cell is {} KiB",
            self.touched,
            self.pages,
            self.end.as_millis(),
            self.cell_pages * PAGE_SIZE / 1024,
        )
    }

    fn address(&self, row: usize) -> u64 {
        (self.first + row as u64 * self.columns as u64 * self.cell_pages) * PAGE_SIZE
    }
}

/// So many pages, in the unit that has no fraction.
fn kib(pages: u64) -> String {
    let kib = pages.saturating_mul(PAGE_SIZE) / 1024;
    match kib {
        kib if kib.is_multiple_of(1 << 20) => format!("{} GiB", kib >> 20),
        kib if kib.is_multiple_of(1 << 10) => format!("{} MiB", kib >> 10),
        kib => format!("{kib} KiB"),
    }
}
