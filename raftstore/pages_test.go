package raftstore

import (
	"errors"
	"fmt"
	"hash/fnv"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"go.etcd.io/bbolt"
)

// TestCheckPages walks files that bbolt wrote: whole ones pass, whatever their shape,
// and each kind of damage is told by its page.
func TestCheckPages(t *testing.T) {
	path := filepath.Join(t.TempDir(), "pages")
	db, err := bbolt.Open(path, 0o600, &bbolt.Options{PageSize: 4096, NoFreelistSync: true})
	if err != nil {
		t.Fatal(err)
	}
	err = db.Update(func(tx *bbolt.Tx) error {
		var faults error
		for name, records := range map[string]int{"empty": 0, "inline": 3, "leaf": 60, "branches": 5000} {
			b, err := tx.CreateBucket([]byte(name))
			if err != nil {
				return err
			}
			for i := range records {
				faults = errors.Join(faults, b.Put(fmt.Appendf(nil, "key-%05d", i), []byte(strings.Repeat("v", 50))))
			}
			if name == "leaf" {
				faults = errors.Join(faults, b.Put([]byte("large"), make([]byte, 3*4096)))
			}
		}
		return faults
	})
	if err := errors.Join(err, db.Close()); err != nil {
		t.Fatal(err)
	}
	if err := checkPages(path); err != nil {
		t.Fatal(err)
	}
	whole := mustRead(t, path)
	meta := whole[4096*1:]
	if order.Uint64(whole[pageHead+48:]) > order.Uint64(meta[pageHead+48:]) {
		meta = whole
	}
	root := int(order.Uint64(meta[pageHead+16:])) * 4096
	reseal := func(b []byte) { // as if bbolt had written the meta page so
		for at := 0; at <= 4096; at += 4096 {
			m := b[at+pageHead:][:metaSize]
			sum := fnv.New64a()
			sum.Write(m[:metaSize-8])
			order.PutUint64(m[metaSize-8:], sum.Sum64())
		}
	}
	for what, c := range map[string]struct {
		damage func(b []byte) []byte
		want   string
	}{
		"cut":            {func(b []byte) []byte { return b[:len(b)/2] }, "is cut short"},
		"empty":          {func([]byte) []byte { return nil }, "both meta pages"},
		"both metas":     {func(b []byte) []byte { b[40] ^= 1; b[4096+40] ^= 1; return b }, "both meta pages"},
		"page size":      {func(b []byte) []byte { b[24] ^= 1; b[4096+24] ^= 1; reseal(b); return b }, "pages of 4097 bytes"},
		"root outside":   {func(b []byte) []byte { b[32+3] = 9; b[4096+32+3] = 9; reseal(b); return b }, "is outside of the file"},
		"number":         {func(b []byte) []byte { b[root]++; return b }, "damaged head"},
		"overflow":       {func(b []byte) []byte { b[root+13] = 200; return b }, "damaged head"},
		"kind":           {func(b []byte) []byte { b[root+8] = 16; return b }, "does not belong there"},
		"count":          {func(b []byte) []byte { b[root+11] = 200; return b }, "too small"},
		"position":       {func(b []byte) []byte { b[root+pageHead+4+1] = 200; return b }, "element 0 outside"},
		"key before":     {func(b []byte) []byte { b[root+pageHead+4] = 1; return b }, "element 0 outside"},
		"length":         {func(b []byte) []byte { b[root+pageHead+12+3] = 1; return b }, "element 0 outside"},
		"no bucket":      {func(b []byte) []byte { b[root+pageHead] = 0; return b }, "flags"},
		"bucket's root":  {func(b []byte) []byte { order.PutUint64(b[value(b, root, "branches"):], 1<<40); return b }, "is outside of the file"},
		"bucket is root": {func(b []byte) []byte { order.PutUint64(b[value(b, root, "branches"):], uint64(root/4096)); return b }, "is used twice"},
		"inline":         {func(b []byte) []byte { b[value(b, root, "inline")+bucketHead+11] = 9; return b }, "has a bucket that is too small"},
		"order":          {func(b []byte) []byte { b[value(b, root, "inline")-len("inline")] = 'z'; return b }, "out of order"},
	} {
		mustWrite(t, path, string(c.damage(slices.Clone(whole))))
		if err := checkPages(path); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v", what, err)
		}
	}
}

// value gives where the value of a key begins that a page holds.
func value(b []byte, page int, key string) int {
	for i := range int(order.Uint16(b[page+10:])) {
		at := page + pageHead + i*pageElement
		begin := at + int(order.Uint32(b[at+4:]))
		if end := begin + int(order.Uint32(b[at+8:])); string(b[begin:end]) == key {
			return end
		}
	}
	panic("no key " + key)
}
