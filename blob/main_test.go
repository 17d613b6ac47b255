package blob

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"io"
	"log/slog"
	"math"
	"math/rand/v2"
	"os"
	"os/exec"
	"testing"
	"time"

	"go.uber.org/goleak"
)

// childVariable makes the test binary play a process to be killed; its value says which.
const childVariable = "BLOB_TEST_CHILD"

func TestMain(m *testing.M) {
	if role := os.Getenv(childVariable); role != "" {
		if err := child(role, os.Args[1]); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		return
	}
	goleak.VerifyTestMain(m)
}

// child writes what it reads from standard input to a store or a cache, and prints the digest.
func child(role, where string) error {
	ctx := context.Background()
	in := &announcer{r: os.Stdin, out: os.Stdout}
	switch role {
	case "put":
		s, err := OpenStore(ctx, where)
		if err != nil {
			return err
		}
		d, _, err := s.Put(ctx, in, math.MaxInt64)
		if err != nil {
			return err
		}
		fmt.Println(d)
	case "get":
		c, err := OpenCache(where, 1<<30, slog.New(slog.DiscardHandler), nil)
		if err != nil {
			return err
		}
		d, err := ParseDigest(os.Args[2])
		if err != nil {
			return err
		}
		_, _, err = c.Get(ctx, d, 1<<20, func(context.Context, Digest, int64) (io.ReadCloser, error) {
			return io.NopCloser(in), nil
		})
		if err != nil {
			return err
		}
		fmt.Println(d)
	}
	return nil
}

// announcer prints how many bytes it has delivered each time that it is asked for more: by then they have been written.
type announcer struct {
	r   io.Reader
	out io.Writer
	n   int
}

func (a *announcer) Read(p []byte) (int, error) {
	fmt.Fprintln(a.out, a.n)
	n, err := a.r.Read(p)
	a.n += n
	return n, err
}

// process is a running child.
type process struct {
	cmd   *exec.Cmd
	stdin io.WriteCloser
	out   *bufio.Scanner
}

func mustStart(tb testing.TB, role string, args ...string) *process {
	tb.Helper()
	p := &process{cmd: exec.Command(os.Args[0], args...)}
	p.cmd.Env = append(os.Environ(), childVariable+"="+role)
	p.cmd.Stderr = os.Stderr
	var err error
	if p.stdin, err = p.cmd.StdinPipe(); err != nil {
		tb.Fatal(err)
	}
	stdout, err := p.cmd.StdoutPipe()
	if err != nil {
		tb.Fatal(err)
	}
	p.out = bufio.NewScanner(stdout)
	if err := p.cmd.Start(); err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(p.kill)
	return p
}

// feed sends b and returns when the child has written all of it and asks for more.
func (p *process) feed(tb testing.TB, b []byte) {
	tb.Helper()
	if _, err := p.stdin.Write(b); err != nil {
		tb.Fatal(err)
	}
	for p.out.Scan() {
		if p.out.Text() == fmt.Sprint(len(b)) {
			return
		}
	}
	tb.Fatalf("child ended early: %v", p.cmd.Wait())
}

// kill ends the child as SIGKILL does: without a chance to clean up.
func (p *process) kill() {
	_ = p.cmd.Process.Kill()
	_ = p.cmd.Wait()
}

// last ends the child's input and returns its last line.
func (p *process) last(tb testing.TB) string {
	tb.Helper()
	p.stdin.Close()
	var line string
	for p.out.Scan() {
		line = p.out.Text()
	}
	if err := p.cmd.Wait(); err != nil {
		tb.Fatal(err)
	}
	return line
}

// random returns n bytes that depend on the seed alone.
func random(seed uint64, n int) []byte {
	b := make([]byte, n)
	var key [32]byte
	key[0], key[1] = byte(seed), byte(seed>>8)
	_, _ = rand.NewChaCha8(key).Read(b)
	return b
}

func mustOpenStore(tb testing.TB, url string) *Store {
	tb.Helper()
	s, err := OpenStore(tb.Context(), url)
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { _ = s.Close() })
	return s
}

func mustPut(tb testing.TB, s *Store, b []byte) Digest {
	tb.Helper()
	d, n, err := s.Put(tb.Context(), bytes.NewReader(b), math.MaxInt64)
	if err != nil {
		tb.Fatal(err)
	}
	if d != Sum(b) || n != int64(len(b)) {
		tb.Fatalf("Put = %s, %d; want %s, %d", d, n, Sum(b), len(b))
	}
	return d
}

func mustRead(tb testing.TB, path string) []byte {
	tb.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		tb.Fatal(err)
	}
	return b
}

// await polls until ok, which must become true.
func await(tb testing.TB, what string, ok func() bool) {
	tb.Helper()
	for deadline := time.Now().Add(30 * time.Second); !ok(); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			tb.Fatalf("never happened: %s", what)
		}
	}
}
