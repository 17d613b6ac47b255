package proc

import (
	"os"
	"testing"
	"time"
)

func TestParseStat(t *testing.T) {
	line := "42 (a b) R 1 (x) S 7 42 41 0 -1 4194560 1 2 3 4 150 50 30 20 20 0 1 0 987654 1000 25 18446744073709551615 1 1\n"
	st, err := parseStat([]byte(line))
	if err != nil {
		t.Fatal(err)
	}
	want := procStat{
		pid: 42, ppid: 7, session: 41, state: 'S', start: 987654,
		cpu: 2 * time.Second, reaped: 500 * time.Millisecond, rss: 25 * int64(os.Getpagesize()),
	}
	if st != want {
		t.Errorf("got %+v, want %+v", st, want)
	}
	for _, bad := range []string{"", "42", "42 (x)", "42 (x) S 1", ") (", "x (y) S 1 1 1 1 1 1 1 1 1 1 1 1 1 1 1 1 1 1 1 1 1 1"} {
		if st, err := parseStat([]byte(bad)); err == nil {
			t.Errorf("%q gives %+v", bad, st)
		}
	}
}

func FuzzParseStat(f *testing.F) {
	b, err := os.ReadFile("/proc/self/stat")
	if err != nil {
		f.Fatal(err)
	}
	f.Add(b)
	f.Fuzz(func(t *testing.T, b []byte) {
		if st, err := parseStat(b); err == nil && st.state == 0 {
			t.Errorf("no state in %q", b)
		}
	})
}
