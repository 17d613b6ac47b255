package agent

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// goCrash is the exit code of a Go program that the runtime ended: a panic, a
// fatal error, or a signal that arrived in C code.
const goCrash = 2

// lastWords bounds how much of a log is searched for them; reasonLimit what is
// quoted.
const (
	lastWords   = 256 << 10
	reasonLimit = 200
)

// crashReason finds in the end of a worker's log how the Go runtime says that it
// crashed; "" when it does not say so. Format (package runtime): "SIGSEGV:
// segmentation violation", "fatal error: …", "panic: …" on lines of their own, the
// latter two perhaps followed by "[signal SIGSEGV: segmentation violation …]".
func crashReason(dir, name string) string {
	files, err := logSeries(dir, name)
	if err != nil || len(files) == 0 {
		return ""
	}
	last := files[len(files)-1]
	f, err := os.Open(filepath.Join(dir, name+"."+strconv.Itoa(last.index)))
	if err != nil {
		return ""
	}
	defer f.Close()
	b := make([]byte, min(last.size, lastWords))
	n, _ := f.ReadAt(b, last.size-int64(len(b)))
	reason, fatal := "", false
	for line := range bytes.Lines(b[:n]) { // the log holds earlier runs too: the last crash counts
		text, nested := strings.CutPrefix(strings.TrimSpace(string(line)), "[signal ")
		name, _, _ := strings.Cut(text, ":")
		switch sig := unix.SignalNum(name); {
		case sig != 0 && len(name) < len(text) && (!nested || fatal):
			reason = fmt.Sprintf("worker ended by signal %d (%s)", int(sig), signalWords(sig))
		case !nested && (name == "fatal error" || name == "panic"):
			reason, fatal = "worker crashed: "+text[:min(len(text), reasonLimit)], name == "fatal error"
		}
	}
	return reason
}
