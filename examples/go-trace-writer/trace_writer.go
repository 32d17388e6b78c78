// Package tracewriter writes what an engine computes as a trace for crossval (docs/trace-format.md).
//
//	model := tracewriter.Model{SHA256: digest, NLayers: 4, NHeads: 4, NKVHeads: 2, HeadDim: 64, Dim: 256,
//		HiddenDim: 640, VocabSize: 1024}
//	trace, err := tracewriter.Create("my-trace", "my engine", model, prompt)
//	trace.State("version", "1.2")                            // and source_commit, compiler, flags
//	trace.BeginPass(prompt)                                  // the prompt; then one pass per decoded token
//	trace.Tap(-1, "inp_embd", x, len(prompt), 256)           // layer -1: of the whole model
//	trace.Tap(0, "q", q, len(prompt), 4, 64)                 // blk.0.q
//	trace.TapFrom(len(prompt)-1, -1, "result_output", logits, 1, 1024) // the last token only
//	trace.EndPass()
//	err = trace.Close()
//
// Call Tap when a tensor has been computed, before its buffer is reused or changed in place. One pass is in memory
// at a time. trace.json comes last: without it the directory is not a trace. The first error stays: later calls do
// nothing, so it is enough to check Close, which then writes no trace.json.
package tracewriter

import (
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"math"
	"os"
	"path/filepath"
)

// Model states the digest of the GGUF file (64 lower-case hexadecimal digits) and the model's shape.
type Model struct {
	SHA256    string `json:"sha256"`
	NLayers   int    `json:"n_layers"`
	NHeads    int    `json:"n_heads"`
	NKVHeads  int    `json:"n_kv_heads"`
	HeadDim   int    `json:"head_dim"`
	Dim       int    `json:"dim"`
	HiddenDim int    `json:"hidden_dim"`
	VocabSize int    `json:"vocab_size"`
}

type object map[string]any

// Writer is a trace being written.
type Writer struct {
	directory     string
	trace, engine object // trace.json, and what it says of the engine
	nTokens       int    // in passes
	passes, taps  []object
	tokenIDs      []int32 // of the pass that has begun; nil outside one
	header        object
	data          []byte
	err           error
}

// Create makes the directory, which must not exist; engine, model and the first token ids are stated in the trace.
func Create(directory, engine string, model Model, promptIDs []int32) (*Writer, error) {
	w := &Writer{directory: directory, engine: object{"name": engine}}
	w.trace = object{"format": "crossval-trace", "format_version": 1, "engine": w.engine, "model": model,
		"prompt": object{"token_ids": append([]int32{}, promptIDs...)}}
	return w, os.Mkdir(directory, 0o777)
}

// State states a fact of the build: "version", "source_commit", "compiler" or "flags".
func (w *Writer) State(fact, value string) { w.engine[fact] = value }

// check returns whether no check has failed so far; the first that did gives the error.
func (w *Writer) check(good bool, why string, values ...any) bool {
	if w.err == nil && !good {
		w.err = fmt.Errorf(why, values...)
	}
	return w.err == nil
}

// save writes a file, which has its name only when it is whole.
func (w *Writer) save(name string, content []byte) {
	path := filepath.Join(w.directory, name)
	if w.err == nil {
		w.err = os.WriteFile(path+".part", content, 0o666)
	}
	if w.err == nil {
		w.err = os.Rename(path+".part", path)
	}
}

// BeginPass begins one call of the engine, with the tokens that follow those of the passes before it.
func (w *Writer) BeginPass(tokenIDs []int32) {
	if w.check(w.tokenIDs == nil, "a pass begins inside another") {
		w.tokenIDs, w.header, w.taps, w.data = append([]int32{}, tokenIDs...), object{}, nil, w.data[:0]
	}
}

// Tap records one tensor of all tokens of the pass; its shape is in docs/trace-format.md.
func (w *Writer) Tap(layer int, name string, data []float32, shape ...int) {
	w.TapFrom(0, layer, name, data, shape...)
}

// TapFrom records one tensor of the tokens from first (0: the pass's first) to the last of the pass.
func (w *Writer) TapFrom(first, layer int, name string, data []float32, shape ...int) {
	n, size, start := len(w.tokenIDs), 1, len(w.data)
	for _, length := range shape {
		size *= length
	}
	if layer >= 0 {
		name = fmt.Sprintf("blk.%d.%s", layer, name)
	}
	good := 0 <= first && first < n && size == len(data)
	if !w.check(good, "%s: %d values, shape %v, from token %d of a pass of %d", name, len(data), shape, first, n) {
		return
	}
	for _, value := range data {
		w.data = binary.LittleEndian.AppendUint32(w.data, math.Float32bits(value))
	}
	key, offsets := fmt.Sprintf("p%d.%s", len(w.passes), name), []int{start, len(w.data)}
	w.header[key] = object{"dtype": "F32", "shape": shape, "data_offsets": offsets}
	tap, rows := object{"name": name, "dtype": "F32", "shape": shape}, []int{}
	for row := first; row < n; row++ {
		rows = append(rows, row)
	}
	if first > 0 {
		tap["rows"] = rows
	}
	w.taps = append(w.taps, tap)
}

// EndPass writes the pass file.
func (w *Writer) EndPass() {
	if !w.check(len(w.taps) > 0, "a pass ends that has no taps, or did not begin") {
		return
	}
	header, err := json.Marshal(w.header)
	w.check(err == nil, "the header: %v", err)
	file := binary.LittleEndian.AppendUint64(nil, uint64(len(header)))
	file = append(append(file, header...), w.data...)
	digest, name, kind := sha256.Sum256(file), fmt.Sprintf("pass-%04d.safetensors", len(w.passes)), "prefill"
	if w.nTokens > 0 && len(w.tokenIDs) == 1 {
		kind = "decode"
	}
	w.save(name, file)
	w.passes = append(w.passes, object{"kind": kind, "start": w.nTokens, "token_ids": w.tokenIDs, "file": name,
		"sha256": hex.EncodeToString(digest[:]), "taps": w.taps})
	w.nTokens += len(w.tokenIDs)
	w.tokenIDs, w.taps = nil, nil
}

// Close writes trace.json, which makes the directory a trace, unless a call has failed; it returns the first error.
func (w *Writer) Close() error {
	w.check(w.tokenIDs == nil && len(w.passes) > 0, "closed inside a pass, or before the first")
	w.trace["passes"] = w.passes
	text, err := json.MarshalIndent(w.trace, "", " ")
	w.check(err == nil, "trace.json: %v", err)
	w.save("trace.json", text)
	return w.err
}
