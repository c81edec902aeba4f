//! The time that a template is told, and `strftime`.

/// A point in time, given by the caller: prompts do not depend on the system's clock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Clock {
    /// Seconds since 1970-01-01 00:00:00, in the time zone that the text shall have.
    pub unix_seconds: i64,
}

const MONTHS: [&str; 12] = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
];
const DAYS: [&str; 7] = [
    "Monday",
    "Tuesday",
    "Wednesday",
    "Thursday",
    "Friday",
    "Saturday",
    "Sunday",
];

impl Clock {
    /// Python's `strftime` in the C locale.
    ///
    /// # Errors
    /// A directive that is not known here, or a year beyond 1 to 9999.
    pub(super) fn format(self, format: &str) -> Result<String, String> {
        let date = Date::new(self.unix_seconds)?;
        let mut out = String::new();
        let mut chars = format.chars();
        while let Some(c) = chars.next() {
            if c != '%' {
                out.push(c);
                continue;
            }
            let (pads, directive) = match chars.next() {
                Some('-') => (false, chars.next()),
                directive => (true, directive),
            };
            let text = directive.and_then(|c| date.field(c));
            let text = text.ok_or_else(|| {
                let shown: String = directive.into_iter().collect();
                format!("strftime_now does not know %{shown}")
            })?;
            match pads {
                true => out.push_str(&text),
                false => out.push_str(match text.trim_start_matches(['0', ' ']) {
                    "" => "0",
                    text => text,
                }),
            }
        }
        Ok(out)
    }
}

struct Date {
    year: i64,
    /// From 1.
    month: usize,
    /// From 1.
    day: i64,
    /// From 0, Monday.
    weekday: usize,
    /// From 1.
    day_of_year: i64,
    second_of_day: i64,
}

impl Date {
    fn new(unix_seconds: i64) -> Result<Self, String> {
        let (days, second_of_day) = (
            unix_seconds.div_euclid(86_400),
            unix_seconds.rem_euclid(86_400),
        );
        // 0001-01-01 to 9999-12-31, as Python's datetime.
        if !(-719_162..=2_932_896).contains(&days) {
            return Err("the time lies outside the years 1 to 9999".to_owned());
        }
        // Years that begin in March have the leap day last; 400 of them repeat.
        let since_march_0 = days + 719_468;
        let (cycle, day_of_cycle) = (
            since_march_0.div_euclid(146_097),
            since_march_0.rem_euclid(146_097),
        );
        let year_of_cycle = (day_of_cycle - day_of_cycle / 1_460 + day_of_cycle / 36_524
            - day_of_cycle / 146_096)
            / 365;
        let from_march =
            day_of_cycle - (365 * year_of_cycle + year_of_cycle / 4 - year_of_cycle / 100);
        let month_from_march = (5 * from_march + 2) / 153;
        let day = from_march - (153 * month_from_march + 2) / 5 + 1;
        let month = (month_from_march + 2) % 12 + 1;
        let year = 400 * cycle + year_of_cycle + i64::from(month <= 2);
        let is_leap = year % 4 == 0 && (year % 100 != 0 || year % 400 == 0);
        let before_march = 59 + i64::from(is_leap);
        let day_of_year = match month {
            1 | 2 => from_march - 306 + 1,
            _ => before_march + from_march + 1,
        };
        Ok(Self {
            year,
            month: month as usize,
            day,
            weekday: (days + 3).rem_euclid(7) as usize,
            day_of_year,
            second_of_day,
        })
    }

    fn field(&self, directive: char) -> Option<String> {
        let (hour, minute, second) = (
            self.second_of_day / 3600,
            self.second_of_day / 60 % 60,
            self.second_of_day % 60,
        );
        let (month, day) = (MONTHS[self.month - 1], DAYS[self.weekday]);
        Some(match directive {
            'Y' => format!("{:04}", self.year),
            'y' => format!("{:02}", self.year % 100),
            'm' => format!("{:02}", self.month),
            'B' => month.to_owned(),
            'b' | 'h' => month[..3].to_owned(),
            'd' => format!("{:02}", self.day),
            'e' => format!("{:2}", self.day),
            'j' => format!("{:03}", self.day_of_year),
            'A' => day.to_owned(),
            'a' => day[..3].to_owned(),
            'u' => (self.weekday + 1).to_string(),
            'w' => ((self.weekday + 1) % 7).to_string(),
            'H' => format!("{hour:02}"),
            'I' => format!("{:02}", (hour + 11) % 12 + 1),
            'p' => (if hour < 12 { "AM" } else { "PM" }).to_owned(),
            'M' => format!("{minute:02}"),
            'S' => format!("{second:02}"),
            'F' => format!("{:04}-{:02}-{:02}", self.year, self.month, self.day),
            'T' => format!("{hour:02}:{minute:02}:{second:02}"),
            'n' => "\n".to_owned(),
            't' => "\t".to_owned(),
            '%' => "%".to_owned(),
            _ => return None,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_are_those_of_python() {
        // Expected: datetime.fromtimestamp(t, timezone.utc).strftime(..) of Python 3.11.
        for (unix_seconds, expected) in [
            (0, "1970-01-01 Thursday Jan 001 12:00:00 AM 70"),
            (951_782_400, "2000-02-29 Tuesday Feb 060 12:00:00 AM 00"),
            (1_735_689_599, "2024-12-31 Tuesday Dec 366 11:59:59 PM 24"),
            (-1, "1969-12-31 Wednesday Dec 365 11:59:59 PM 69"),
            (4_107_542_400, "2100-03-01 Monday Mar 060 12:00:00 AM 00"),
        ] {
            let clock = Clock { unix_seconds };
            let text = clock.format("%Y-%m-%d %A %b %j %I:%M:%S %p %y");
            assert_eq!(text.as_deref(), Ok(expected));
        }
        let clock = Clock { unix_seconds: 0 };
        assert_eq!(clock.format("%-d %e %-H%%").as_deref(), Ok("1  1 0%"));
        assert!(clock.format("%Q").is_err() && clock.format("%").is_err());
        let far = Clock {
            unix_seconds: i64::MAX,
        };
        assert!(far.format("%Y").is_err());
    }
}
