package e2e

import (
	"bufio"
	"errors"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"
	"time"
)

// TestReaderOfOutputEndsFirst closes dev's output before the Ctrl-C, as the end
// of `rxvision dev | tee log` does: dev must still end its processes.
func TestReaderOfOutputEndsFirst(t *testing.T) {
	p := newPlatform(t)
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(binary, append([]string{"dev", "--data-dir", p.data}, p.flags()...)...)
	cmd.Stdout, cmd.Stderr = w, w
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	p.cmd = cmd
	w.Close()
	lines := bufio.NewReader(r)
	for line := ""; !strings.Contains(line, "Ctrl-C ends everything."); {
		if line, err = lines.ReadString('\n'); errors.Is(err, io.EOF) {
			t.Fatal("dev ended by itself")
		}
	}
	r.Close()
	if err := p.interrupt(); err != nil {
		t.Errorf("dev: %v", err)
	}
	if left := p.processes(); len(left) > 0 {
		t.Errorf("processes are left behind: %v", left)
	}
}

// TestKilledWhileStarting kills the supervisor at moments of its start. What it
// started is found by `dev --stop`, which is not told the ports again.
func TestKilledWhileStarting(t *testing.T) {
	p := newPlatform(t)
	for range 4 {
		p.launch()
		time.Sleep(time.Duration(rand.IntN(400)) * time.Millisecond) // the random moment
		if err := p.cmd.Process.Signal(syscall.SIGKILL); err != nil {
			t.Fatal(err)
		}
		_ = p.cmd.Wait()
		p.cmd = nil
		p.rxvision(0, "dev", "--stop", "--data-dir", p.data)
		if left := p.processes(); len(left) > 0 {
			t.Fatalf("processes are left behind: %v", left)
		}
	}
	p.start()
}
