package ort

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
)

// The fields of ONNX's ModelProto that matter here; source: onnx.proto.
const (
	fieldIRVersion = 1
	fieldGraph     = 7
	lastField      = 26
)

// maxFields bounds the walk over a file that claims to be a model.
const maxFields = 1 << 20

// Inspect says whether a file can be an ONNX model, without loading it and without ONNX Runtime: it walks the outermost
// fields and steps over their contents. Its faults are ErrNotModel and ErrTruncated.
func Inspect(path string) error {
	base := filepath.Base(path)
	info, err := os.Stat(path)
	if err != nil {
		return fmt.Errorf("open model: %w", err)
	}
	if !info.Mode().IsRegular() {
		return fmt.Errorf("%s: %w: it is no regular file", base, ErrNotModel)
	}
	f, err := os.Open(path)
	if err != nil {
		return fmt.Errorf("open model: %w", err)
	}
	defer f.Close()
	if err := walk(f, info.Size()); err != nil {
		return fmt.Errorf("%s: %w", base, err)
	}
	return nil
}

// cursor reads a file and knows how far it is.
type cursor struct {
	*bufio.Reader
	file io.ReadSeeker
	at   int64
}

func (c *cursor) ReadByte() (byte, error) {
	b, err := c.Reader.ReadByte()
	if err == nil {
		c.at++
	}
	return b, err
}

// field reads a field's number and wire type, and how many bytes of it follow.
func (c *cursor) field() (number, wire, size uint64, err error) {
	tag, err := binary.ReadUvarint(c)
	number, wire = tag>>3, tag&7
	if err != nil || number == 0 || number > lastField {
		return 0, 0, 0, err
	}
	switch wire {
	case 0:
		_, err = binary.ReadUvarint(c)
	case 1:
		size = 8
	case 2:
		size, err = binary.ReadUvarint(c)
	case 5:
		size = 4
	default:
		number = 0
	}
	return number, wire, size, err
}

// skip steps over n bytes, which are there.
func (c *cursor) skip(n int64) error {
	c.at += n
	if n <= int64(c.Buffered()) {
		_, err := c.Discard(int(n))
		return err
	}
	_, err := c.file.Seek(c.at, io.SeekStart)
	c.Reset(c.file)
	return err
}

// walk reads the outermost fields of a ModelProto of the given size.
func walk(f io.ReadSeeker, size int64) error {
	if size == 0 {
		return fmt.Errorf("%w: the file is empty", ErrNotModel)
	}
	var ir, graph bool
	c := &cursor{Reader: bufio.NewReader(f), file: f}
	for n := 0; c.at < size; n++ {
		start := c.at
		number, wire, length, err := c.field()
		ended := errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF)
		left := uint64(size - c.at)
		switch {
		case ir && ended:
			return fmt.Errorf("%w: it ends inside the field at byte %d", ErrTruncated, start)
		case ir && err == nil && length > left:
			return fmt.Errorf("%w: the field at byte %d needs %d bytes, %d are left", ErrTruncated, start, length, left)
		case err != nil || number == 0 || length > left || n == maxFields:
			return fmt.Errorf("%w: byte %d does not begin a field of one", ErrNotModel, start)
		}
		if err := c.skip(int64(length)); err != nil {
			return err
		}
		ir = ir || number == fieldIRVersion && wire == 0
		graph = graph || number == fieldGraph && wire == 2
	}
	switch {
	case !ir:
		return fmt.Errorf("%w: it has no IR version", ErrNotModel)
	case !graph:
		return fmt.Errorf("%w: it has no graph", ErrTruncated)
	}
	return nil
}
