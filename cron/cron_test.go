package cron

import (
	"strings"
	"testing"
	"time"
	_ "time/tzdata" // the machine may lack it
)

func mustParse(tb testing.TB, zone string, exprs ...string) *Schedule {
	tb.Helper()
	s, err := Parse(zone, exprs...)
	if err != nil {
		tb.Fatal(err)
	}
	return s
}

func utc(text string) time.Time {
	t, err := time.Parse(time.DateTime, text)
	if err != nil {
		panic(err)
	}
	return t
}

func TestNext(t *testing.T) {
	for _, test := range []struct {
		zone  string
		exprs []string
		from  string
		want  []string
	}{
		{"", []string{"@hourly"}, "2026-03-01 10:00:00", []string{"2026-03-01 11:00:00", "2026-03-01 12:00:00"}},
		{"UTC", []string{"*/40 * * * * * *"}, "2026-03-01 10:00:01", []string{"2026-03-01 10:00:40", "2026-03-01 10:01:00"}},
		{"", []string{"0 12 * * *", "30 9 * * MON"}, "2026-03-01 13:00:00", []string{"2026-03-02 09:30:00", "2026-03-02 12:00:00", "2026-03-03 12:00:00"}},
		{"", []string{"0 0 29 2 *"}, "2026-03-01 13:00:00", []string{"2028-02-29 00:00:00", "2032-02-29 00:00:00"}},
		{"", []string{"0 0 1 1 * 2030", "0 0 1 1 * 2027"}, "2026-03-01 13:00:00", []string{"2027-01-01 00:00:00", "2030-01-01 00:00:00", ""}},
		// Clocks in New York go from 02:00 to 03:00 on 8 March, and from 02:00 to 01:00 on 1 November.
		{"America/New_York", []string{"30 2 * * *"}, "2026-03-07 12:00:00", []string{"2026-03-09 06:30:00"}},
		{"America/New_York", []string{"30 1 * * *"}, "2026-10-31 12:00:00", []string{"2026-11-01 05:30:00", "2026-11-01 06:30:00", "2026-11-02 06:30:00"}},
		{"America/New_York", []string{"0 12 * * *"}, "2026-03-07 12:00:00", []string{"2026-03-07 17:00:00", "2026-03-08 16:00:00"}},
	} {
		s, at := mustParse(t, test.zone, test.exprs...), utc(test.from)
		for i, want := range test.want {
			at = s.Next(at)
			switch {
			case want == "" && !at.IsZero(), want != "" && !at.Equal(utc(want)):
				t.Errorf("%q in %q: time %d after %s is %v, want %s", test.exprs, test.zone, i+1, test.from, at, want)
			case !at.IsZero() && at.Location() != s.zone:
				t.Errorf("%q in %q: the time is told in %v", test.exprs, test.zone, at.Location())
			}
		}
	}
}

// TestTimesGoOn: Apia had no 30 December 2011, where the library stands still.
func TestTimesGoOn(t *testing.T) {
	s, at := mustParse(t, "Pacific/Apia", "0 12 * * *"), utc("2011-12-27 00:00:00")
	for range 8 {
		due := s.Next(at)
		if !due.After(at) || due.Sub(at) > 72*time.Hour {
			t.Fatalf("after %v comes %v", at, due)
		}
		at = due
	}
}

func TestParseNamesAllThatIsWrong(t *testing.T) {
	for _, test := range []struct {
		zone  string
		exprs []string
		want  []string
	}{
		{"Mars/Olympus", []string{"@hourly"}, []string{`unknown time zone "Mars/Olympus"`}},
		{"../../etc/passwd", []string{"@hourly"}, []string{"unknown time zone"}},
		{"Local", []string{"@hourly"}, []string{"may differ"}},
		{"", []string{""}, []string{`cron expression ""`}},
		{"", []string{"* *", "@hourly", "61 * * * *", "0 0 31 2 *", "@reboot"}, []string{`"* *"`, `"61 * * * *"`, `"0 0 31 2 *": names a time that never comes`, `"@reboot"`}},
		{"X", []string{"X"}, []string{`time zone "X"`, `expression "X"`}},
	} {
		_, err := Parse(test.zone, test.exprs...)
		if err == nil {
			t.Errorf("%q in %q was taken", test.exprs, test.zone)
			continue
		}
		for _, want := range test.want {
			if !strings.Contains(err.Error(), want) {
				t.Errorf("%q in %q: %v, which lacks %s", test.exprs, test.zone, err, want)
			}
		}
		if n := strings.Count(err.Error(), "\n") + 1; n != len(test.want) {
			t.Errorf("%q in %q: %d faults, want %d:\n%v", test.exprs, test.zone, n, len(test.want), err)
		}
	}
}

// FuzzParse: whatever a user writes, nothing panics and times come one after the other.
func FuzzParse(f *testing.F) {
	for _, text := range []string{"@daily", "*/5 * * * *", "0 0 1 1 * 2030", "*/40 * * * * * *", "0 0 L * 5#3", "1-5,7/2 0 15W * *", "@", "L L L L L"} {
		f.Add(text, "Europe/Berlin")
	}
	f.Fuzz(func(t *testing.T, text, zone string) {
		s, err := Parse(zone, text)
		if err != nil {
			return
		}
		at := beginning
		for range 3 {
			due := s.Next(at)
			if due.IsZero() {
				return
			}
			if !due.After(at) {
				t.Fatalf("%q in %q: after %v comes %v", text, zone, at, due)
			}
			at = due
		}
	})
}
