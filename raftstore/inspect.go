package raftstore

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"os"
	"path/filepath"

	"go.etcd.io/bbolt"

	"github.com/rxvision/rxvision/cluster"
)

// Kinds of snapshot files.
const (
	KindArchive  = "archive"  // rxvision snapshot save, nomad operator snapshot save
	KindSnapshot = "snapshot" // a server's own bbolt file
)

// Inspection is what a snapshot file holds.
type Inspection struct {
	Info
	Path   string
	Kind   string // KindArchive or KindSnapshot
	Length int64  // bytes of the file
	// Fault says why the file cannot be restored; nil: every checksum is right and
	// the records make a whole state. With a fault the counts may be incomplete.
	Fault error
}

// Inspect reads an archive or a server's snapshot file, and says what is in it and
// whether it is sound. The error is for files that are neither, or cannot be read.
func Inspect(path string) (*Inspection, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	stat, err := f.Stat()
	if err != nil {
		return nil, err
	}
	in := &Inspection{Path: path, Length: stat.Size()}
	var begin [20]byte
	if _, err := io.ReadFull(f, begin[:]); err != nil && !errors.Is(err, io.EOF) && !errors.Is(err, io.ErrUnexpectedEOF) {
		return nil, err
	}
	switch {
	case begin[0] == sealPrefix[0] && begin[1] == sealPrefix[1]:
		in.Kind = KindArchive
		if _, err := f.Seek(0, io.SeekStart); err != nil {
			return nil, err
		}
		info, err := VerifyArchive(f, 1<<62)
		if in.Fault = err; err == nil {
			in.Info = *info
		}
	case order.Uint32(begin[16:]) == boltMagic:
		in.Kind, in.Size, in.Created = KindSnapshot, stat.Size(), stat.ModTime().UTC()
		in.Fault = in.readBolt()
	default:
		return nil, fmt.Errorf("%s is neither a snapshot archive nor a server's snapshot file", path)
	}
	return in, nil
}

// readBolt counts, then builds the whole state. A server's file has its hash
// beside it.
func (in *Inspection) readBolt() error {
	if meta, err := readSnapshotMeta(filepath.Join(filepath.Dir(in.Path), metaFile)); err == nil {
		if _, err := verifySnapshot(filepath.Dir(filepath.Dir(filepath.Dir(in.Path))), meta); err != nil {
			return err
		}
	} else if err := checkPages(in.Path); err != nil {
		return err
	}
	err := guard(func() error {
		db, err := bbolt.Open(in.Path, 0o600, &bbolt.Options{ReadOnly: true, Timeout: lockTimeout})
		if err != nil {
			return err
		}
		defer db.Close()
		return db.View(in.count)
	})
	if err == nil {
		err = guard(func() error { _, _, err := readSnapshot(in.Path); return err })
	}
	return err
}

func (in *Inspection) count(tx *bbolt.Tx) error {
	var head snapshotHead
	counts, err := readMeta(tx, &head)
	if err != nil {
		return err
	}
	in.Index, in.Term, in.CreatedBy = head.Index, head.Term, head.CreatedBy
	var faults error
	for _, t := range cluster.Tables {
		info := TableInfo{Name: t.Name}
		if b := tx.Bucket([]byte(t.Name)); b != nil {
			err := b.ForEach(func(k, v []byte) error {
				info.Records++
				info.Bytes += int64(len(v))
				return checkRecord(t, k, v)
			})
			faults = errors.Join(faults, err)
		}
		if info.Records != counts[t.Name] {
			faults = errors.Join(faults, fmt.Errorf("table %s holds %d readable records, its count says %d", t.Name, info.Records, counts[t.Name]))
		}
		in.Tables = append(in.Tables, info)
	}
	return faults
}

// checkRecord compares a record of a snapshot file with its checksum.
func checkRecord(t *cluster.Table, key, sealed []byte) error {
	n := len(sealed) - crc32.Size
	if n < 1 || recordSum(t.Name, key, sealed[:n]) != binary.BigEndian.Uint32(sealed[n:]) {
		return fmt.Errorf("table %s: record %q is damaged", t.Name, key)
	}
	return nil
}
