package cluster

import (
	"crypto/sha256"
	"encoding/binary"
)

// Hash is the SHA-256 over every record of every table, in the order of Records: of an allocation as AppendStored gives
// it, of others as Marshal does. It is equal for two servers that have applied the same log up to the same index, and
// for a state before and after it went through a snapshot.
func (s *Snapshot) Hash() [sha256.Size]byte {
	sum := sha256.New()
	var record []byte
	put := func(b []byte) {
		var n [8]byte
		binary.BigEndian.PutUint64(n[:], uint64(len(b)))
		sum.Write(n[:])
		sum.Write(b)
	}
	err := s.Records(func(t *Table, key string, v any) error {
		if _, ok := v.(*Allocation); ok {
			record = AppendStored(record[:0], v)
		} else {
			record = Marshal(v)
		}
		put([]byte(t.Name))
		put([]byte(key))
		put(record)
		return nil
	})
	if err != nil {
		panic(err) // only what the function above gives
	}
	return [sha256.Size]byte(sum.Sum(nil))
}
