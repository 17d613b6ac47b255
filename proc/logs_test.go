package proc

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

func TestLogRotation(t *testing.T) {
	spec := sh(t, `i=100; while [ $i -lt 200 ]; do echo "line $i"; i=$((i+1)); done`)
	spec.Stdout.MaxFiles, spec.Stdout.MaxBytes = 3, 100 // 11 lines of 9 bytes in each
	for run := range 2 {
		if st, _ := mustRun(t, spec); !st.Success() {
			t.Fatalf("run %d: %v", run, st)
		}
		r := rotator{LogFiles: spec.Stdout}
		n := r.indices()
		slices.Sort(n)
		if len(n) != 3 || n[2] != n[0]+2 || n[0] == 0 {
			t.Fatalf("run %d: files %v", run, n)
		}
		var all strings.Builder
		for _, i := range n {
			b, err := os.ReadFile(r.path(i))
			if err != nil {
				t.Fatal(err)
			}
			if len(b) > 100 || b[len(b)-1] != '\n' {
				t.Errorf("file %d: %q", i, b)
			}
			all.Write(b)
		}
		if !strings.HasSuffix(all.String(), "line 198\nline 199\n") || strings.Count(all.String(), "\n") < 23 {
			t.Errorf("run %d: kept %q", run, all.String())
		}
	}
}

func TestBothStreamsInOneLog(t *testing.T) {
	spec := sh(t, `echo out; echo err >&2; echo out`)
	spec.Stderr = spec.Stdout
	if _, out := mustRun(t, spec); out != "out\nerr\nout\n" {
		t.Errorf("log %q", out)
	}
}

func TestNoLogs(t *testing.T) {
	spec := sh(t, `echo x; echo y >&2`)
	spec.Stdout, spec.Stderr = LogFiles{}, LogFiles{}
	if st, _ := mustRun(t, spec); !st.Success() {
		t.Error(st)
	}
}

func TestRotatorKeepsLines(t *testing.T) {
	for _, c := range []struct {
		name   string
		writes []string
		want   []string
	}{
		{"fits", []string{"ab\n", "cd\n"}, []string{"ab\ncd\n"}},
		{"line starts in the next file", []string{"abcdef\n", "ghijkl\n"}, []string{"abcdef\n", "ghijkl\n"}},
		{"split between lines", []string{"abc\ndef\nghi\n"}, []string{"abc\ndef\n", "ghi\n"}},
		{"line longer than a file", []string{strings.Repeat("x", 25)}, []string{"xxxxxxxxxx", "xxxxxxxxxx", "xxxxx"}},
		{"exactly full", []string{"123456789\n", "a"}, []string{"123456789\n", "a"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			r, err := openRotator(LogFiles{Dir: t.TempDir(), Name: "x", MaxBytes: 10, MaxFiles: 9})
			if err != nil {
				t.Fatal(err)
			}
			defer r.Close()
			for _, w := range c.writes {
				if n, err := r.Write([]byte(w)); n != len(w) || err != nil {
					t.Errorf("write: %d, %v", n, err)
				}
			}
			var got []string
			for i := range r.index + 1 {
				b, err := os.ReadFile(r.path(i))
				if err != nil {
					t.Fatal(err)
				}
				got = append(got, string(b))
			}
			if fmt.Sprint(got) != fmt.Sprint(c.want) {
				t.Errorf("files %q, want %q", got, c.want)
			}
		})
	}
}

func TestFullDiskLosesLogNotTask(t *testing.T) {
	dir := t.TempDir()
	// /dev/full answers every write with ENOSPC
	if err := os.Symlink("/dev/full", filepath.Join(dir, "x.0")); err != nil {
		t.Fatal(err)
	}
	r, err := openRotator(LogFiles{Dir: dir, Name: "x"})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { r.Close() }()
	for range 2 {
		if n, err := r.Write([]byte("12345")); n != 5 || err != nil {
			t.Fatalf("write: %d, %v", n, err)
		}
	}
	if err := r.next(); err != nil { // there is room again
		t.Fatal(err)
	}
	r.Write([]byte("67890\n"))
	b, err := os.ReadFile(r.path(1))
	if err != nil {
		t.Fatal(err)
	}
	if s := string(b); !strings.Contains(s, "10 bytes of this log were lost") || !strings.HasSuffix(s, "67890\n") {
		t.Errorf("log %q", s)
	}
}
