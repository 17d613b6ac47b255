package proc

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
)

// rotator writes a LogFiles series. Write never fails and never blocks on anything but the file: what a full disk refuses
// is dropped, counted, and noted in the log once writing works again, because a task must not stop for its log.
type rotator struct {
	LogFiles
	file    *os.File
	index   int
	size    int64
	dropped int64
	cause   error
}

func openRotator(l LogFiles) (*rotator, error) {
	if l.MaxFiles == 0 {
		l.MaxFiles = DefaultLogFiles
	}
	if l.MaxBytes == 0 {
		l.MaxBytes = DefaultLogBytes
	}
	r := &rotator{LogFiles: l}
	for _, i := range r.indices() {
		r.index = max(r.index, i)
	}
	if err := r.open(); err != nil {
		return nil, err
	}
	return r, nil
}

func (r *rotator) path(i int) string { return filepath.Join(r.Dir, r.Name+"."+strconv.Itoa(i)) }

// indices lists the files of the series that exist.
func (r *rotator) indices() []int {
	entries, _ := os.ReadDir(r.Dir) // a missing directory shows itself when the file is opened
	var out []int
	for _, e := range entries {
		if s, ok := strings.CutPrefix(e.Name(), r.Name+"."); ok {
			if i, err := strconv.Atoi(s); err == nil && i >= 0 {
				out = append(out, i)
			}
		}
	}
	return out
}

// open opens the current index for appending and removes the files that are too old.
func (r *rotator) open() error {
	f, err := os.OpenFile(r.path(r.index), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return fmt.Errorf("log: %w", err)
	}
	fi, err := f.Stat()
	if err != nil {
		f.Close()
		return fmt.Errorf("log: %w", err)
	}
	if r.file != nil {
		r.file.Close()
	}
	r.file, r.size = f, fi.Size()
	for _, i := range r.indices() {
		if i <= r.index-r.MaxFiles {
			os.Remove(r.path(i))
		}
	}
	return nil
}

func (r *rotator) next() error {
	r.index++
	if err := r.open(); err != nil {
		r.index--
		return err
	}
	return nil
}

// Write appends p, moving on to a new file when one is full. Lines are kept whole where they fit into one file.
func (r *rotator) Write(p []byte) (int, error) {
	all := len(p)
	for len(p) > 0 {
		n := int(min(r.MaxBytes-r.size, int64(len(p))))
		if n < len(p) && n > 0 {
			if nl := bytes.LastIndexByte(p[:n], '\n'); nl >= 0 {
				n = nl + 1
			} else if r.size > 0 {
				n = 0 // the line starts in the next file
			}
		}
		if n <= 0 {
			if err := r.next(); err != nil {
				r.drop(len(p), err)
				return all, nil
			}
			continue
		}
		r.append(p[:n])
		p = p[n:]
	}
	return all, nil
}

func (r *rotator) append(p []byte) {
	if r.dropped > 0 {
		note := fmt.Sprintf("[rxvision: %d bytes of this log were lost: %v]\n", r.dropped, r.cause)
		if n, err := r.file.WriteString(note); err != nil {
			r.size += int64(n)
			r.drop(len(p), err)
			return
		}
		r.size += int64(len(note))
		r.dropped, r.cause = 0, nil
	}
	n, err := r.file.Write(p)
	r.size += int64(n)
	if err != nil {
		r.drop(len(p)-n, err)
	}
}

func (r *rotator) drop(n int, err error) {
	r.dropped += int64(n)
	r.cause = err
}

func (r *rotator) Close() error { return r.file.Close() }
