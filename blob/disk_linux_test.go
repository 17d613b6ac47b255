package blob

import (
	"bytes"
	"context"
	"errors"
	"io"
	"log/slog"
	"math"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// mustMountSmall returns a folder on a file system of its own with 1 MiB.
func mustMountSmall(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "size=1m"); err != nil {
		t.Skipf("a small file system is needed to fill a disk; mounting one takes root: %v", err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, 0); err != nil {
			t.Error(err)
		}
	})
	return dir
}

func TestPutOnAFullDisk(t *testing.T) {
	stored, err := OpenStore(t.Context(), "file://"+mustMountSmall(t))
	if err != nil {
		t.Fatal(err)
	}
	defer stored.Close()
	for range 3 { // were anything left behind, the last would fail
		d, n, err := stored.Put(t.Context(), bytes.NewReader(random(1, 2<<20)), math.MaxInt64)
		if !errors.Is(err, ErrNoSpace) || d != (Digest{}) || n != 0 {
			t.Errorf("Put of 2 MiB on a disk of 1 MiB = %s, %d, %v; want ErrNoSpace", d, n, err)
		}
		if got := leftovers(t, stored); len(got) != 0 {
			t.Errorf("left behind: %v", got)
		}
	}
	mustPut(t, stored, random(2, 700_000))
}

func TestPutThatCannotBeStaged(t *testing.T) {
	s := mustOpenStore(t, "mem://")
	t.Setenv("TMPDIR", mustMountSmall(t))
	if _, _, err := s.Put(t.Context(), bytes.NewReader(random(1, 2<<20)), math.MaxInt64); !errors.Is(err, ErrNoSpace) {
		t.Errorf("Put = %v, want ErrNoSpace", err)
	}
	mustPut(t, s, random(2, 700_000))
}

func TestGetOnAFullDisk(t *testing.T) {
	dir := mustMountSmall(t)
	c, err := OpenCache(dir, 1<<30, slog.New(slog.DiscardHandler), nil)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	get := func(b []byte) error {
		_, release, err := c.Get(t.Context(), Sum(b), int64(len(b)), func(_ context.Context, _ Digest, offset int64) (io.ReadCloser, error) {
			return io.NopCloser(bytes.NewReader(b[offset:])), nil
		})
		if err == nil {
			release()
		}
		return err
	}
	if err := get(random(1, 2<<20)); !errors.Is(err, ErrNoSpace) {
		t.Errorf("Get = %v, want ErrNoSpace", err)
	}
	if err := get(random(2, 700_000)); err != nil {
		t.Errorf("the failed download keeps the disk full: %v", err)
	}
	mustBeSound(t, c)
}

// TestPutIsDurable watches the system calls of a Put: the bytes must be on the disk before they get their name, and the
// names of the blob and of its new folder before Put returns.
func TestPutIsDurable(t *testing.T) {
	strace, err := exec.LookPath("strace")
	if err != nil {
		t.Skip("strace shows the order of system calls; install the package strace")
	}
	root, trace := t.TempDir(), filepath.Join(t.TempDir(), "trace")
	b := random(1, 300_000)
	cmd := exec.Command(strace, "-f", "-y", "-qq", "-e", "trace=write,fsync,fdatasync,rename,renameat,renameat2", "-e", "signal=none",
		"-o", trace, os.Args[0], "file://"+root)
	cmd.Env = append(os.Environ(), childVariable+"=put")
	cmd.Stdin = bytes.NewReader(b)
	out, err := cmd.Output()
	if err != nil {
		var exit *exec.ExitError
		if errors.As(err, &exit) && strings.Contains(string(exit.Stderr), "ptrace") {
			t.Skipf("strace is not permitted here: %s", exit.Stderr)
		}
		t.Fatal(err)
	}
	d := Sum(b)
	if !strings.HasSuffix(strings.TrimSpace(string(out)), d.String()) {
		t.Fatalf("the child printed %q, want %s at the end", out, d)
	}
	calls, at := string(mustRead(t, trace)), 0
	store := regexp.QuoteMeta(root)
	for _, want := range []string{
		`write\(\d+<` + store + `/tmp/put-\d+>`,
		`fsync\(\d+<` + store + `/tmp/put-\d+>`,
		`rename\w*\(.*/tmp/put-\d+", .*/sha256/` + d.Hex()[:2] + `/` + d.Hex() + `"`,
		`fsync\(\d+<` + store + `/sha256/` + d.Hex()[:2] + `>`,
		`fsync\(\d+<` + store + `/sha256>`,
		`write\(1<.*` + d.String()[:20],
	} {
		found := regexp.MustCompile(want).FindStringIndex(calls[at:])
		if found == nil {
			t.Fatalf("no %s in its place among the system calls:\n%s", want, calls)
		}
		at += found[1]
	}
}
