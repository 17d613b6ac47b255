package raftstore

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/fnv"
	"io"
	"os"
)

// bbolt follows the numbers in its pages without a look at where they lead: a damaged
// one reads foreign memory, and Go ends the process for it. So a file that no hash
// covers is walked here first. The format is that of
// https://github.com/etcd-io/bbolt/blob/main/internal/common (page.go, meta.go, bucket.go), version 2.
const (
	boltMagic   = 0xED0CDAED // at byte 16, in the machine's order
	boltVersion = 2

	pageHead    = 16 // number, kind, count of elements, count of further pages
	pageElement = 16 // of a branch: position, key's length, page; of a leaf: flags, position, key's length, value's length
	pageBranch  = 1
	pageLeaf    = 2
	bucketFlag  = 1  // of a leaf's element: the value is a bucket
	bucketHead  = 16 // root page, sequence; root 0: the page follows
	metaSize    = 64 // of which the last 8 bytes are a checksum

	pageSizeMin, pageSizeMax = 1 << 10, 16 << 20
)

var order = binary.NativeEndian

// checkPages says whether every page that bbolt would read of the file lies in it, once,
// and every key and value in its page. Buckets hold records and no buckets, as all files
// of this package have it. What the records say is not looked at.
func checkPages(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	stat, err := f.Stat()
	if err != nil {
		return err
	}
	w := pageWalk{file: f}
	root, err := w.readMeta(stat.Size())
	if err != nil {
		return err
	}
	return w.page(root, true)
}

type pageWalk struct {
	file io.ReaderAt
	size int64  // of a page, in bytes
	seen []bool // by the page's number; as many as are in use
}

// readMeta finds the size of pages and the page of the root bucket, in the newer of
// the two meta pages that is whole.
func (w *pageWalk) readMeta(length int64) (root uint64, err error) {
	var newest []byte
	look := func(at int64) {
		b := make([]byte, pageHead+metaSize)
		if _, err := w.file.ReadAt(b, at); err != nil {
			return
		}
		b = b[pageHead:]
		sum := fnv.New64a()
		sum.Write(b[:metaSize-8])
		if order.Uint32(b) != boltMagic || order.Uint32(b[4:]) != boltVersion || order.Uint64(b[metaSize-8:]) != sum.Sum64() {
			return
		}
		if newest == nil || order.Uint64(b[48:]) > order.Uint64(newest[48:]) { // the transaction's number
			newest = b
		}
	}
	look(0)
	if newest != nil {
		look(int64(order.Uint32(newest[8:])))
	} else {
		for at := int64(pageSizeMin); at <= pageSizeMax && newest == nil; at *= 2 {
			look(at)
		}
	}
	if newest == nil {
		return 0, errors.New("its structure is damaged (both meta pages)")
	}
	w.size = int64(order.Uint32(newest[8:]))
	used := order.Uint64(newest[40:])
	if w.size < pageSizeMin || w.size > pageSizeMax || w.size&(w.size-1) != 0 {
		return 0, fmt.Errorf("its structure is damaged (pages of %d bytes)", w.size)
	}
	if used > uint64(length/w.size) {
		return 0, fmt.Errorf("is cut short: %d pages of %d bytes are in use, it has %d bytes", used, w.size, length)
	}
	w.seen = make([]bool, used)
	return order.Uint64(newest[16:]), nil
}

// page walks a page and all below it; root: of the bucket that holds the buckets.
func (w *pageWalk) page(number uint64, root bool) error {
	wrong := func(what string) error { return fmt.Errorf("its structure is damaged (page %d %s)", number, what) }
	if number < 2 || number >= uint64(len(w.seen)) {
		return wrong("is outside of the file")
	}
	var head [pageHead]byte
	if _, err := w.file.ReadAt(head[:], int64(number)*w.size); err != nil {
		return err
	}
	pages := 1 + uint64(order.Uint32(head[12:]))
	if order.Uint64(head[:]) != number || number+pages > uint64(len(w.seen)) {
		return wrong("has a damaged head")
	}
	for i := number; i < number+pages; i++ {
		if w.seen[i] {
			return wrong("is used twice")
		}
		w.seen[i] = true
	}
	b := make([]byte, int64(pages)*w.size)
	if _, err := w.file.ReadAt(b, int64(number)*w.size); err != nil {
		return err
	}
	children, err := checkPage(b, root, true)
	if err != nil {
		return wrong(err.Error())
	}
	below := root && order.Uint16(b[8:]) == pageBranch
	for _, c := range children {
		if err := w.page(c, below); err != nil {
			return err
		}
	}
	return nil
}

// checkPage checks the elements of one page, and gives the pages that it leads to: of a
// branch those below it, of the root's leaf those of the buckets.
func checkPage(b []byte, root, branches bool) (children []uint64, err error) {
	if len(b) < pageHead {
		return nil, errors.New("is cut short")
	}
	kind, count := order.Uint16(b[8:]), int(order.Uint16(b[10:]))
	branch := kind == pageBranch
	if kind != pageLeaf && !(branch && branches && count > 0) {
		return nil, fmt.Errorf("is of a kind (%#x, %d elements) that does not belong there", kind, count)
	}
	if pageHead+count*pageElement > len(b) {
		return nil, fmt.Errorf("is too small for %d elements", count)
	}
	end := pageHead + count*pageElement // of the element before: bbolt writes them in order
	var last []byte
	for i := range count {
		at := pageHead + i*pageElement
		e := b[at:]
		var flags, pos, key, value uint64
		if branch {
			pos, key = uint64(order.Uint32(e)), uint64(order.Uint32(e[4:]))
		} else {
			flags, pos, key, value = uint64(order.Uint32(e)), uint64(order.Uint32(e[4:])), uint64(order.Uint32(e[8:])), uint64(order.Uint32(e[12:]))
		}
		begin := uint64(at) + pos
		if begin < uint64(end) || begin+key+value > uint64(len(b)) {
			return nil, fmt.Errorf("has element %d outside of it", i)
		}
		end = int(begin + key + value)
		k := b[begin : begin+key]
		if i > 0 && bytes.Compare(last, k) >= 0 {
			return nil, fmt.Errorf("has element %d out of order", i)
		}
		last = k
		switch v := b[begin+key : end]; {
		case branch:
			children = append(children, order.Uint64(e[8:]))
		case root != (flags == bucketFlag) || flags > bucketFlag:
			return nil, fmt.Errorf("has element %d of flags %#x", i, flags)
		case !root:
		case len(v) < bucketHead:
			return nil, fmt.Errorf("has a bucket of %d bytes", len(v))
		case order.Uint64(v) != 0:
			children = append(children, order.Uint64(v))
		default:
			if _, err := checkPage(v[bucketHead:], false, false); err != nil {
				return nil, fmt.Errorf("has a bucket that %w", err)
			}
		}
	}
	return children, nil
}
