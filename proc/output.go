package proc

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// outputLimit bounds what Output keeps of each stream.
const outputLimit = 1 << 20

// Output runs a short command to its end and returns its standard output; more than 1 MiB of it is an error. The command dies with
// ctx and with the caller. A failure carries the end status and the last line of standard error. Spec.Stdout, Spec.Stderr
// and Spec.StatusFile are set by Output; the other fields count, Dir defaults to "/".
func Output(ctx context.Context, spec Spec) ([]byte, error) {
	dir, err := os.MkdirTemp("", "rx-output-")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(dir)
	spec.StatusFile = filepath.Join(dir, "status")
	spec.Stdout = LogFiles{Dir: dir, Name: "stdout", MaxFiles: 1, MaxBytes: outputLimit}
	spec.Stderr = LogFiles{Dir: dir, Name: "stderr", MaxFiles: 1, MaxBytes: outputLimit}
	spec.DieWithParent = true
	if spec.Dir == "" {
		spec.Dir = "/"
	}
	p, err := Start(spec)
	if err != nil {
		return nil, err
	}
	defer p.Detach()
	st, err := p.Wait(ctx)
	if ctx.Err() != nil && err != nil {
		_, stopErr := p.Stop(ctx, unix.SIGKILL, 0)
		return nil, errors.Join(fmt.Errorf("%s: %w", spec.Path, err), stopErr)
	}
	if err != nil {
		return nil, fmt.Errorf("%s: %w", spec.Path, err)
	}
	out, err := readLog(dir, "stdout")
	if err != nil {
		return nil, err
	}
	if !st.Success() {
		text, _ := readLog(dir, "stderr") // its absence only shortens the message
		lines := strings.Split(strings.TrimSpace(string(text)), "\n")
		return out, fmt.Errorf("%s: %v: %s", spec.Path, st, lines[len(lines)-1])
	}
	return out, nil
}

// readLog reads the one file of a stream that Output captured.
func readLog(dir, name string) ([]byte, error) {
	r := rotator{LogFiles: LogFiles{Dir: dir, Name: name}}
	if n := r.indices(); len(n) != 1 || n[0] != 0 {
		return nil, fmt.Errorf("more than %d bytes of %s", outputLimit, name)
	}
	return os.ReadFile(r.path(0))
}
